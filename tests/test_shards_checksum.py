"""A row's checksum is the sum of its words, and no single change to a row escapes it."""

from pathlib import Path

import numpy as np
import pytest

from shards.arrays import map_arrays, save_arrays
from shards.checksum import row_checksums


def by_hand(arrays: list[np.ndarray]) -> list[int]:
    """The same from Python's integers: 8-byte words, little-endian, the last filled with zeros."""
    sums = []
    for row in range(len(arrays[0])):
        total = 0
        for array in arrays:
            data = np.array(array[row]).tobytes()
            for start in range(0, len(data), 8):
                total += int.from_bytes(data[start : start + 8], "little")
        sums.append(total % 2**64)
    return sums


def random_bytes(*shape: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    return data.view(dtype).reshape(shape)


@pytest.mark.parametrize("length", [*range(18), 63, 64, 65, 154])
def test_any_length_of_row_is_summed_as_python_does(length):
    rows = random_bytes(7, length)
    sums = row_checksums([rows])
    assert (sums.dtype, sums.shape) == (np.uint64, (7,))
    assert sums.tolist() == by_hand([rows])


@pytest.mark.parametrize("dtype", ["float16", "int8", "uint16", "float32", "int64"])
def test_any_dtype_and_shape_is_summed_by_its_bytes(dtype):
    rows = random_bytes(5, 3, 7, 5, dtype=dtype)
    assert row_checksums([rows]).tolist() == by_hand([rows])
    scalars = random_bytes(5, dtype=dtype)
    assert row_checksums([scalars]).tolist() == by_hand([scalars])


def test_words_overflow_modulo_two_to_the_64():
    rows = np.full((3, 40), 255, np.uint8)
    assert row_checksums([rows]).tolist() == [5 * (2**64 - 1) % 2**64] * 3


def test_several_arrays_add_up_and_each_is_padded_by_itself():
    arrays = [random_bytes(6, 11), random_bytes(6, 3, seed=1), random_bytes(6, 2, dtype="float32")]
    sums = row_checksums(arrays)
    assert sums.tolist() == by_hand(arrays)
    parts = [row_checksums([array]) for array in arrays]
    assert sums.tolist() == (parts[0] + parts[1] + parts[2]).tolist()


def test_no_rows_and_empty_rows_are_fine():
    assert row_checksums([np.empty((0, 8, 4, 4), np.float16)]).shape == (0,)
    assert row_checksums([np.empty((0, 7), np.int8), np.empty((0, 3), np.float32)]).shape == (0,)
    assert row_checksums([np.empty((4, 0), np.int8)]).tolist() == [0] * 4
    with_empty = [np.empty((4, 0), np.int8), random_bytes(4, 9)]
    assert row_checksums(with_empty).tolist() == by_hand(with_empty)


def test_a_rows_checksum_does_not_depend_on_its_neighbours():
    rows = random_bytes(9, 21)
    whole = row_checksums([rows])
    for row in range(9):
        assert row_checksums([rows[row : row + 1]])[0] == whole[row]
    assert row_checksums([rows[::-1]]).tolist() == whole[::-1].tolist()


def test_input_that_is_not_contiguous_is_summed_as_if_it_were():
    wide = random_bytes(6, 8, 10, dtype="float16")
    for view in (
        wide[:, ::2],
        wide[::2],
        wide[:, :, 3:8],
        wide[:, ::-1, ::-3],
        wide.transpose(1, 0, 2),
        wide.transpose(2, 1, 0),
        np.asfortranarray(wide),
        np.broadcast_to(wide[:1], (4, 8, 10)),
    ):
        assert row_checksums([view]).tolist() == by_hand([view])


def test_the_input_is_left_alone_and_may_be_read_only():
    rows = random_bytes(4, 13)
    before = rows.copy()
    rows.flags.writeable = False
    row_checksums([rows])
    assert (rows == before).all()


def test_a_mapped_file_gives_the_checksum_of_what_was_written(tmp_path: Path):
    arrays = {
        "states": random_bytes(5, 7, 3, dtype="int8"),
        "scale": random_bytes(5, 7, dtype="float32"),
    }
    save_arrays(tmp_path / "x.safetensors", arrays)
    mapped = map_arrays(tmp_path / "x.safetensors")
    assert not mapped["states"].flags.owndata
    names = ("states", "scale")
    sums = row_checksums([mapped[name] for name in names])
    assert sums.tolist() == by_hand([arrays[name] for name in names])
    raw = np.memmap(tmp_path / "x.safetensors", np.uint8, "r", offset=1, shape=(3, 30))
    sums = row_checksums([raw])
    assert type(sums) is np.ndarray
    assert sums.tolist() == by_hand([raw])


def test_any_single_flipped_bit_changes_the_checksum_of_its_row_alone():
    arrays = [random_bytes(3, 11), random_bytes(3, 8, seed=1)]
    before = row_checksums(arrays)
    for array in arrays:
        for place in range(array.shape[1]):
            for bit in range(8):
                array[1, place] ^= 1 << bit
                changed = row_checksums(arrays) != before
                assert changed.tolist() == [False, True, False], (place, bit)
                array[1, place] ^= 1 << bit
    assert (row_checksums(arrays) == before).all()


@pytest.mark.parametrize("seed", range(20))
def test_any_other_bytes_in_one_word_change_it(seed):
    rng = np.random.default_rng(seed)
    rows = random_bytes(1, 64, seed=seed)
    before = row_checksums([rows])[0]
    word = int(rng.integers(0, 8)) * 8
    rows[0, word : word + 8] = rng.integers(0, 256, 8, dtype=np.uint8)
    assert row_checksums([rows])[0] != before


@pytest.mark.parametrize("seed", range(20))
def test_a_row_that_is_zeroed_cut_or_swapped_for_another_is_told_apart(seed):
    rows = random_bytes(2, 100, seed=seed)
    first, second = row_checksums([rows])
    assert first != second
    cut = rows.copy()
    cut[:, 50:] = 0  # a page that never reached the disk
    assert (row_checksums([cut]) != [first, second]).all()
    assert row_checksums([np.zeros_like(rows)]).tolist() == [0, 0]
