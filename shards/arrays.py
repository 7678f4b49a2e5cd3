"""Struct-of-arrays files: safetensors, written whole and read by memory map.

The reader parses the header itself (8 bytes of length, JSON, then raw little-endian data) because
the safetensors library copies what it returns, and a training batch wants single rows of a file of
gigabytes. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import mmap
from functools import partial
from pathlib import Path

import numpy as np

from shards.errors import CorruptFileError
from shards.storage import Location

Arrays = dict[str, np.ndarray]

_DTYPES = {
    **{"F16": "<f2", "F32": "<f4", "I8": "|i1", "U16": "<u2"},
    **{"I32": "<i4", "I64": "<i8", "U64": "<u8"},
}
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}
_ALIGNMENT = 8
_MAX_HEADER_BYTES = 100_000_000


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays as one local safetensors file; `shards.receipt.commit` makes it count.

    Into the very file that is there: the library's own writer puts another in its place, which
    would slip from the lock that keeps a second writer off.
    """
    # Widest first, so that each array is aligned to its numbers.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0]))
    header, offset = {}, 0
    for name, array in ordered:
        span = [offset, offset + array.nbytes]
        dtype = _NAMES[array.dtype.newbyteorder("<")]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in ordered:
            little = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
            file.write(little.reshape(-1).view(np.uint8).data)


def map_arrays(path: Path, where: Location | None = None) -> Arrays:
    """Memory-map the arrays of a safetensors file, read-only and without copying.

    One map for all of them: each keeps a file handle, of which a process may have 1,024 only.

    Args:
        path: a local file.
        where: what to call it in an error, where `path` is a copy.

    Raises:
        CorruptFileError: the file is missing, cut short, or not a safetensors file.
    """
    where = path if where is None else where
    corrupt = partial(CorruptFileError, where, remedy=repair_remedy(where))
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, num_bytes - 8):
                raise corrupt("no safetensors header")
            header = json.loads(file.read(header_bytes))
            mapped = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
        return {
            name: _array_of(mapped, entry, 8 + header_bytes)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise corrupt("is missing") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise corrupt(f"broken header ({error})") from None


def _array_of(mapped: mmap.mmap, entry: dict, data_start: int) -> np.ndarray:
    begin, end = entry["data_offsets"]
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if begin < 0 or end - begin != wanted or data_start + end > len(mapped):
        raise ValueError(f"{len(mapped)} bytes, wanted at least {data_start + end}")
    if any(length < 0 for length in shape):
        raise ValueError(f"shape {shape}")
    flat = np.frombuffer(mapped, dtype, wanted // dtype.itemsize, data_start + begin)
    return flat.reshape(shape)


def repair_remedy(where: Location) -> str:
    """What to do about a bad file of a dataset: `<dataset>/<folder>/<file>`."""
    return f"python -m shards repair {where.parent.parent}, then the same precompute again"
