"""Write MDS, the format of mosaicml-streaming, from arrays.

Its own writer lives in a package that pins older libraries than training needs, and the format is
small. A shard is: number of samples (uint32), their offsets (uint32 each, and the end), the
schema as JSON, the samples. A sample is: the lengths of its fields without a fixed one (uint32
each), then its fields, in the order of their names. `index.json` repeats the schema for each shard.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from shards.column import Json
from shards.errors import UserError

MAX_SHARD_BYTES = 2**32 - 1  # offsets have 32 bits
_VERSION = 2


class MdsShard:
    """One shard in the making; all its samples have the fields of the first.

    Args:
        base_name: of its file.

    Attributes:
        num_bytes: of its samples so far.
    """

    def __init__(self, base_name: str) -> None:
        self.base_name = base_name
        self._encodings: dict[str, str] = {}
        self._samples: list[bytes] = []
        self.num_bytes = 0

    def add(self, sample: dict[str, Any]) -> None:
        """Append a sample of strings, integers and arrays."""
        fields = dict(sorted(sample.items()))
        if not self._samples:
            self._encodings = {name: _encoding(value) for name, value in fields.items()}
        encoded = [_encode(value) for value in fields.values()]
        lengths = [
            len(data)
            for data, encoding in zip(encoded, self._encodings.values(), strict=True)
            if _fixed_size(encoding) is None
        ]
        self._samples.append(np.array(lengths, "<u4").tobytes() + b"".join(encoded))
        self.num_bytes += len(self._samples[-1])

    def save(self, path: Path) -> None:
        """Write the shard to a local file.

        Raises:
            UserError: the format's offsets cannot reach so far.
        """
        header = self._header()
        lengths = np.array([0, *map(len, self._samples)], dtype=np.int64)
        offsets = lengths.cumsum() + 4 + 4 * len(lengths) + len(header)
        if offsets[-1] > MAX_SHARD_BYTES:
            raise UserError(
                path, f"{offsets[-1]:,} bytes", wanted=f"at most {MAX_SHARD_BYTES:,} in a shard"
            )
        with path.open("wb") as file:
            file.write(np.uint32(len(self._samples)).astype("<u4").tobytes())
            file.write(offsets.astype("<u4").tobytes())
            file.write(header)
            file.writelines(self._samples)

    def entry(self, num_bytes: int) -> Json:
        """The shard's entry in index.json."""
        return {
            **self._schema(),
            "hashes": [],
            "raw_data": {"basename": self.base_name, "bytes": num_bytes, "hashes": {}},
            "samples": len(self._samples),
            "version": _VERSION,
            "zip_data": None,
        }

    def _schema(self) -> Json:
        return {
            "column_encodings": list(self._encodings.values()),
            "column_names": list(self._encodings),
            "column_sizes": [_fixed_size(encoding) for encoding in self._encodings.values()],
            "compression": None,
            "format": "mds",
            "hashes": [],
            "size_limit": None,
        }

    def _header(self) -> bytes:
        return json.dumps({**self._schema(), "version": _VERSION}, sort_keys=True).encode()


def index_text(entries: list[Json]) -> str:
    """The text of index.json."""
    return json.dumps({"shards": entries, "version": _VERSION}, sort_keys=True)


def _encoding(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"ndarray:{value.dtype}:{','.join(map(str, value.shape))}"
    return "int" if isinstance(value, int) else "str"


def _encode(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return np.int64(value).tobytes() if isinstance(value, int) else str(value).encode()


def _fixed_size(encoding: str) -> int | None:
    if encoding.startswith("ndarray:"):
        _, dtype, shape = encoding.split(":")
        return int(np.dtype(dtype).itemsize * np.prod([int(side) for side in shape.split(",")]))
    return 8 if encoding == "int" else None
