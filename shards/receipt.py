"""Receipts: one small JSON beside every data file. They are the truth about a latent dataset.

A data file counts only when its receipt is there; a receipt is written last, and the first one
stays. It names the source shard, accounts for every source row, and carries the hash of the data
file and of itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from shards.arrays import Arrays, map_arrays, repair_remedy
from shards.canonical import canonical_json, sha256_of
from shards.column import FORMAT_VERSION, Json
from shards.errors import CorruptFileError, DatasetError
from shards.storage import (
    Location,
    list_files,
    local_copy,
    read_bytes,
    read_many,
    remove,
    size_of,
    write_text_whole,
    write_whole,
)

NULL = "null"
DATA_SUFFIXES = ("safetensors", "parquet")
_SEAL = "sha256_of_this"


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What became of one source shard in one column (or in the ledger).

    Args:
        shard: name of the shard, from its source's file name.
        column: spec of the column as JSON; None for the ledger.
        source: `url`, `bytes` and `sha256` of the source shard.
        rows_in: rows of the ledger, one per source sample.
        rows: how many of them this file holds.
        absent: the others, counted by reason; rows_in = rows + sum(absent).
        data_bytes: length of the data file.
        data_sha256: hash of the data file.
        stats: image columns: `latent_mean`, `latent_std` of the scaled latents; int8 columns:
            `relative_error` of what is stored; text columns: `captions`, the distinct ones.
        model: where the encoder was loaded from; for people, no part of the fingerprint.
        versions: of the libraries that the bytes may depend on.
        timings: seconds by stage, `decode_workers` and the `bottleneck`, the stage that the others
            waited for; the only part that differs between two equal runs.
    """

    shard: str
    column: Json | None
    source: Json
    rows_in: int
    rows: int
    absent: dict[str, int]
    data_bytes: int
    data_sha256: str
    stats: Json = field(default_factory=dict)
    model: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    timings: Json = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = self.rows + sum(self.absent.values())
        if total != self.rows_in:
            raise DatasetError(
                f"receipt of shard {self.shard}",
                f"{self.rows} rows and {sum(self.absent.values())} absent make {total}",
                wanted=f"the {self.rows_in} rows of its source",
                remedy="precompute this shard again",
            )


def receipt_path(data: Location) -> Location:
    """`00000.json` for `00000.safetensors` or `00000.parquet`."""
    return data.with_suffix(".json")


def file_facts(path: Path) -> Json:
    """`data_bytes` and `data_sha256` of a local file, as a receipt states them."""
    return {"data_bytes": path.stat().st_size, "data_sha256": sha256_of(path)}


def commit(
    data: Location, fill: Callable[[Path], None], receipt_of: Callable[[Json], Receipt]
) -> Receipt:
    """Write a data file, then the receipt that makes it count.

    Two workers may do this for one shard at the same time. Equal input makes equal bytes, so it
    does not matter whose data file stays; the first receipt stays, and the second worker holds
    its own bytes to it.

    Args:
        data: the data file's place.
        fill: makes the data file at a local path.
        receipt_of: builds the receipt from the data file's `file_facts`.

    Raises:
        DatasetError: another worker has just written other bytes for the same shard.
        StorageError: it cannot be written.
    """
    try:
        receipt = read_receipt(receipt_path(data))
    except FileNotFoundError:
        pass
    else:
        # The length after the receipt: whoever finished in between is seen whole.
        if size_of(data) == receipt.data_bytes:
            return receipt
        remove(receipt_path(data))  # of a data file that is gone or cut short
    facts: Json = {}

    def fill_and_measure(path: Path) -> None:
        fill(path)
        facts.update(file_facts(path))

    write_whole(data, fill_and_measure)
    receipt = receipt_of(facts)
    if write_receipt(data, receipt):
        return receipt
    theirs = read_receipt(receipt_path(data))
    if theirs.data_sha256 != receipt.data_sha256:
        raise DatasetError(
            data,
            "two workers encoded this shard at once, and their bytes differ",
            remedy=f"python -m shards repair {data.parent.parent}, then one job at a time on "
            "machines of one kind",
        )
    return theirs


def _sealed(document: Json) -> Json:
    """The document with the hash of its own text."""
    unsealed = {name: value for name, value in document.items() if name != _SEAL}
    text = canonical_json(unsealed)
    return {**unsealed, _SEAL: hashlib.sha256(text.encode()).hexdigest()}


def _receipt_text(document: Json) -> str:
    """The one text of a receipt.

    Timings have a seal of their own: all the rest, its seal included, is equal between equal runs.
    """
    rest = {name: value for name, value in document.items() if name != "timings"}
    return canonical_json({**_sealed(rest), "timings": _sealed(document["timings"])})


def write_receipt(data: Location, receipt: Receipt) -> bool:
    """Make a data file count; False when it has a receipt already, which stays."""
    document = {"format_version": FORMAT_VERSION, **asdict(receipt)}
    return write_text_whole(receipt_path(data), _receipt_text(document), replace=False)


def read_receipt(path: Location) -> Receipt:
    """Read and check one receipt.

    Raises:
        FileNotFoundError: it is not there.
        CorruptFileError: a byte of it is not what was written.
        DatasetError: it is of another format version.
    """
    return parse_receipt(path, read_bytes(path))


def parse_receipt(path: Location, data: bytes) -> Receipt:
    """A receipt from its bytes; see `read_receipt`."""
    remedy = repair_remedy(path)
    try:
        document = json.loads(data)
        version = document["format_version"]
        intact = data == _receipt_text(document).encode()
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFileError(path, f"not a receipt ({error!r})", remedy=remedy) from None
    if version != FORMAT_VERSION:
        raise DatasetError(
            path,
            f"format version {version}",
            wanted=f"version {FORMAT_VERSION}",
            remedy="read the dataset with the release that wrote it, or precompute it again",
        )
    if not intact:
        raise CorruptFileError(path, "its text does not match its own hash", remedy=remedy)
    for seal in (document, document["timings"]):
        del seal[_SEAL]
    del document["format_version"]
    return Receipt(**document)


def read_receipt_of(data: Location) -> Receipt | None:
    """The receipt of a data file; None unless both are there and the length is the one stated."""
    num_bytes = size_of(data)
    try:
        receipt = read_receipt(receipt_path(data))
    except FileNotFoundError:
        return None
    return receipt if num_bytes == receipt.data_bytes else None


def read_committed(data: Location) -> Arrays:
    """The arrays of a small data file, held to its receipt.

    Raises:
        CorruptFileError: it, or its receipt, is missing or not what was written.
    """
    try:
        receipt = read_receipt(receipt_path(data))
        with local_copy(data) as path:
            if sha256_of(path) != receipt.data_sha256:
                raise CorruptFileError(
                    data,
                    "its bytes are not those that were written (sha256 differs)",
                    remedy=repair_remedy(data),
                )
            return {name: np.array(array) for name, array in map_arrays(path, data).items()}
    except FileNotFoundError:
        raise CorruptFileError(
            data, "is missing, or its receipt is", remedy=repair_remedy(data)
        ) from None


def iter_receipt_files(folder: Location) -> Iterator[tuple[Location, bytes]]:
    """The receipts of a column or of the ledger, unparsed, in the order of names."""
    names = [name for name in list_files(folder) if name.endswith(".json")]
    for name, data in read_many(folder, names):
        yield folder / name, data


def finished_shards(folder: Location) -> dict[str, Receipt]:
    """Receipts of the shards of a column, or of the ledger, whose data file is as long as stated.

    One listing and many receipts at a time: quick on an object store too.
    """
    sizes = list_files(folder)
    found = {}
    for path, data in iter_receipt_files(folder):
        receipt = parse_receipt(path, data)
        lengths = [sizes.get(f"{path.stem}.{suffix}") for suffix in DATA_SUFFIXES]
        if receipt.data_bytes in lengths:
            found[path.stem] = receipt
    return found


def refuse_changed_source(receipt: Receipt, dataset: Location, source: Json) -> None:
    """Hold a source shard to the one that a receipt speaks of.

    Args:
        receipt: of the shard, in any column or in the ledger.
        dataset: for the error.
        source: `url`, and what is known of `bytes` and `sha256`.

    Raises:
        DatasetError: its bytes are others now.
    """
    if any(receipt.source[fact] != source[fact] for fact in source if fact != "url"):
        raise DatasetError(
            source["url"],
            f"is not the shard {receipt.shard} that {dataset} was made from (its bytes changed)",
            remedy=f"another --out, or delete shard {receipt.shard} from {dataset} (ledger and all "
            "columns)",
        )
