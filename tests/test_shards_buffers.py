"""Batch memory comes back when nobody holds it, and never a moment before."""

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from shards.buffers import BufferPool
from shards.quantize import Quantized, latents_of
from train.transfer import to_device

SHAPE, DTYPE = (6, 4, 5), "float16"

VIEWS: dict[str, Callable[[np.ndarray], Any]] = {
    "the array": lambda array: array,
    "a slice": lambda array: array[2:4],
    "a single row": lambda array: array[3],
    "every second": lambda array: array[::2],
    "reversed": lambda array: array[::-1, ::-1],
    "reshaped": lambda array: array.reshape(-1),
    "another dtype": lambda array: array.view(np.uint8),
    "transposed": lambda array: array.transpose(2, 0, 1),
    "a view of views": lambda array: array.reshape(3, -1)[1:].view(np.uint16)[..., ::3].T,
    "an iterator's rows": lambda array: list(array),
    "a memoryview": lambda array: memoryview(array),
    "a buffer's array": lambda array: np.frombuffer(memoryview(array).cast("B"), np.uint8),
    "numpy.asarray": lambda array: np.asarray(array),
    "split": lambda array: np.split(array, 3)[1],
    "broadcast": lambda array: np.broadcast_to(array, (2, *array.shape)),
    "torch.as_tensor": lambda array: torch.as_tensor(array),
    "torch.from_numpy": lambda array: torch.from_numpy(array),
    "a slice of a tensor": lambda array: torch.as_tensor(array)[1:3, ::2],
    "a tensor's array": lambda array: torch.as_tensor(array).numpy()[2:],
    "a tensor of a slice": lambda array: torch.as_tensor(array[2:4]),
    "what training moves": lambda array: to_device(array, torch.device("cpu")),
    "quantized": lambda array: Quantized(array, (array[0],)),
}


def address_of(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def bytes_of(view: Any) -> bytes:
    if isinstance(view, torch.Tensor):
        return view.contiguous().numpy().tobytes()
    if isinstance(view, Quantized):
        return view.values.tobytes() + b"".join(scale.tobytes() for scale in view.scales)
    if isinstance(view, list):
        return b"".join(row.tobytes() for row in view)
    return bytes(view.tobytes())


def filled(pool: BufferPool, number: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    array = pool(shape, DTYPE)
    array[...] = number
    return array


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (SHAPE, DTYPE),
        ((3,), np.dtype("<f4")),
        ((), "int8"),
        ((2, 3), np.uint16),
        ((1, 77, 9), "i8"),
    ],
)
def test_it_gives_what_numpy_empty_gives(shape, dtype):
    array, like = BufferPool()(shape, dtype), np.empty(shape, dtype)
    assert (array.shape, array.dtype, array.strides) == (like.shape, like.dtype, like.strides)
    assert array.flags.writeable
    assert array.flags.c_contiguous
    assert array.flags.aligned


@pytest.mark.parametrize("shape", [(0,), (0, 4, 8), (4, 0)])
def test_arrays_of_no_size_are_fine_and_come_back_too(shape):
    pool = BufferPool()
    for _ in range(3):
        arrays = [pool(shape, "float32") for _ in range(4)]
        assert [array.shape for array in arrays] == [shape] * 4
        assert torch.as_tensor(arrays[0]).numel() == 0


def test_memory_that_nobody_holds_is_used_again():
    pool = BufferPool()
    first = pool(SHAPE, DTYPE)
    address = address_of(first)
    del first
    for _ in range(20):
        again = pool(SHAPE, DTYPE)
        assert address_of(again) == address
        del again


def test_equal_bytes_are_equal_memory_whatever_the_shape():
    pool = BufferPool()
    first = pool((4, 6), "float32")
    address = address_of(first)
    del first
    assert address_of(pool((8, 3, 4), "uint8")) == address


def test_other_sizes_have_memory_of_their_own():
    pool = BufferPool()
    small = pool((4,), "uint8")
    del small
    large = filled(pool, 7, (1000,))
    other = filled(pool, 8, (4,))
    assert (large == 7).all()
    assert (other == 8).all()


def test_two_arrays_at_a_time_never_share_memory():
    pool = BufferPool()
    for _ in range(5):
        held = [filled(pool, number) for number in range(10)]
        assert len({address_of(array) for array in held}) == 10
        assert all((array == number).all() for number, array in enumerate(held))
        del held


@pytest.mark.parametrize("name", VIEWS)
def test_memory_is_kept_as_long_as_any_view_lives(name):
    pool = BufferPool()
    array = filled(pool, 3)
    address = address_of(array)
    view = VIEWS[name](array)
    before = bytes_of(view)
    del array
    others = [filled(pool, 9) for _ in range(4)]
    assert address not in {address_of(other) for other in others}
    assert bytes_of(view) == before
    del view, others
    addresses = {address_of(other) for other in [pool(SHAPE, DTYPE) for _ in range(6)]}
    assert address in addresses


def test_integers_that_training_multiplies_out_do_not_change_under_it():
    pool = BufferPool()
    values = pool((2, 4, 3, 3), "int8")
    scale = pool((2, 4), "float32")
    values[...], scale[...] = 5, 0.5
    stored = latents_of(values, scale)
    del values, scale
    for number in range(5):
        pool((2, 4, 3, 3), "int8")[...] = number
        pool((2, 4), "float32")[...] = number
    assert (stored.dequantize() == 2.5).all()
    assert (to_device(stored, torch.device("cpu")) == 2.5).all()


def test_a_view_that_another_thread_lets_go_is_what_frees_the_memory():
    pool = BufferPool()
    array = filled(pool, 1)
    address = address_of(array)
    held, may_end = [array[1:]], threading.Event()
    del array

    def hold() -> None:
        view = held.pop()
        may_end.wait(10)
        assert (view == 1).all()

    thread = threading.Thread(target=hold)
    thread.start()
    while held:
        pass
    assert address_of(pool(SHAPE, DTYPE)) != address
    may_end.set()
    thread.join()
    assert address in {address_of(other) for other in [pool(SHAPE, DTYPE) for _ in range(3)]}


def test_memory_does_not_grow_with_the_number_of_batches():
    pool = BufferPool()
    seen = set()
    held: list[np.ndarray] = []
    for number in range(300):
        held.append(filled(pool, number % 100))
        seen.add(address_of(held[-1]))
        if len(held) > 4:
            held.pop(0)
    assert len(seen) <= 6


def test_under_stress_from_many_threads_nobodys_numbers_change():
    """Views of all kinds, held for a while in several threads and dropped in any order."""
    pool = BufferPool()
    shapes = [SHAPE, (4, 6, 5), (24,), (6, 2), (50,)]
    wrong: list[str] = []
    makers = list(VIEWS.values())

    def work(seed: int) -> None:
        choose = random.Random(seed)
        held: list[tuple[Any, bytes]] = []
        for turn in range(400):
            array = pool(choose.choice(shapes), "float16")
            array[...] = (seed * 400 + turn) % 2039
            view = choose.choice(makers)(array) if array.shape == SHAPE else array[1:]
            held.append((view, bytes_of(view)))
            del array, view
            if len(held) > choose.randrange(8):
                view, before = held.pop(choose.randrange(len(held)))
                if bytes_of(view) != before:
                    wrong.append(f"thread {seed}, turn {turn}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
