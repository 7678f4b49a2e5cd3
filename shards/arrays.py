"""Struct-of-arrays files: safetensors, written whole and read by memory map.

The reader parses the header itself (8 bytes of length, JSON, then raw little-endian data) because
the safetensors library copies what it returns, and a training batch wants single rows of a file of
gigabytes. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from shards.errors import CorruptFileError
from shards.storage import write_whole

Arrays = dict[str, np.ndarray]

_DTYPES = {"F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8", "U16": "<u2", "I8": "|i1"}
_MAX_HEADER_BYTES = 100_000_000
_REMEDY = "delete the file and its receipt (the .json beside it) and run the same precompute again"


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays as one safetensors file that appears whole or not at all."""
    from safetensors.numpy import save_file

    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_whole(path, lambda temporary: save_file(contiguous, temporary))


def map_arrays(path: Path) -> Arrays:
    """Memory-map the arrays of a safetensors file, read-only and without copying.

    Raises:
        CorruptFileError: the file is missing, cut short, or not a safetensors file.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, num_bytes - 8):
                raise CorruptFileError(path, "no safetensors header", remedy=_REMEDY)
            header = json.loads(file.read(header_bytes))
        return {
            name: _map_one(path, entry, 8 + header_bytes, num_bytes)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise CorruptFileError(path, "is missing", remedy=_REMEDY) from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CorruptFileError(path, f"broken header ({error})", remedy=_REMEDY) from None


def _map_one(path: Path, entry: dict, data_start: int, num_bytes: int) -> np.ndarray:
    begin, end = entry["data_offsets"]
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if begin < 0 or end - begin != wanted or data_start + end > num_bytes:
        raise CorruptFileError(
            path, f"{num_bytes} bytes", wanted=f"at least {data_start + end}", remedy=_REMEDY
        )
    if wanted == 0:  # an empty file region cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=data_start + begin, shape=shape)
