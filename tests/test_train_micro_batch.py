"""Rows of a forward pass: as many as fit, and always a divisor of a process's share."""

import pytest
import torch

from train.micro_batch import choose_micro_batch
from train.presets import PRESETS

GIB = 2**30


def peak_bytes(rows: int) -> int:
    """15 GiB of weights and optimizer, and half a GiB for each row."""
    return 15 * GIB + rows * GIB // 2


@pytest.mark.parametrize(
    ("share", "available_gib", "rows"),
    [
        (2048, 139, 128),  # 85% of 139 GiB hold 206 rows
        (2048, 80, 64),  # 106 rows
        (2048, 24, 8),  # 10 rows
        (96, 139, 96),  # all of it
        (210, 80, 105),
        (7, 24, 7),
        (11, 24, 1),  # a prime above what fits
        (2048, 16, 1),  # not even one: then that is what runs out of memory, and says so
    ],
)
def test_auto_takes_the_largest_divisor_that_fits(share, available_gib, rows):
    assert choose_micro_batch("auto", share, peak_bytes, available_gib * GIB) == rows


def test_what_does_not_grow_with_the_rows_is_no_division_by_zero():
    assert choose_micro_batch("auto", 64, lambda rows: GIB, 8 * GIB) == 64


@pytest.mark.parametrize(("most", "rows"), [(0, 1), (1, 1), (2, 2), (5, 2), (6, 8)])
def test_a_trial_that_does_not_fit_says_how_few_do(most, rows):
    def peak(size: int) -> int:
        assert size <= 8, "no more than there are"
        if size > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return peak_bytes(size)

    assert choose_micro_batch("auto", 8, peak, 24 * GIB) == rows


@pytest.mark.parametrize("share", [1, 2, 3, 5])
def test_no_more_rows_are_tried_than_there_are(share):
    def peak(size: int) -> int:
        assert size <= share
        return peak_bytes(size)

    assert choose_micro_batch("auto", share, peak, 80 * GIB) == share


@pytest.mark.parametrize(("share", "rows"), [(2048, 16), (32, 16), (24, 12), (5, 5), (17, 1)])
def test_auto_is_at_most_sixteen_where_memory_cannot_be_measured(share, rows):
    assert choose_micro_batch("auto", share) == rows


@pytest.mark.parametrize(("requested", "rows"), [(0, 32), (8, 8), (32, 32)])
def test_a_number_is_taken_as_it_is(requested, rows):
    assert choose_micro_batch(requested, 32) == rows


def test_the_presets_of_real_models_fill_the_memory():
    sizes = {name: config.micro_batch_size for name, config in PRESETS.items()}
    assert {name for name, size in sizes.items() if size == "auto"} == {*PRESETS} - {"tiny"}
