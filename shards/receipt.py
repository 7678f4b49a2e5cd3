"""Receipts: one small JSON beside every data file. They are the truth about a latent dataset.

A data file counts only when its receipt is there; a receipt is written last. It names the source
shard, accounts for every source row, and carries the hash of the data file and of itself.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shards.column import FORMAT_VERSION, Json
from shards.errors import CorruptFileError, DatasetError
from shards.storage import canonical_json, sha256_of, write_text_whole

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
        stats: image columns: `latent_mean`, `latent_std` of the scaled latents; counters.
        model: where the encoder was loaded from; for people, no part of the fingerprint.
        versions: of the libraries that the bytes may depend on.
        timings: seconds by stage; the only part that differs between two equal runs.
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
    timings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = self.rows + sum(self.absent.values())
        if total != self.rows_in:
            raise DatasetError(
                f"receipt of shard {self.shard}",
                f"{self.rows} rows and {sum(self.absent.values())} absent make {total}",
                wanted=f"the {self.rows_in} rows of its source",
                remedy="precompute this shard again",
            )


def receipt_path(data_path: Path) -> Path:
    """`00000.json` for `00000.safetensors` or `00000.parquet`."""
    return data_path.with_suffix(".json")


def file_facts(data_path: Path) -> Json:
    """`data_bytes` and `data_sha256` of a file, as a receipt states them."""
    return {"data_bytes": data_path.stat().st_size, "data_sha256": sha256_of(data_path)}


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


def write_receipt(data_path: Path, receipt: Receipt) -> None:
    """Make a data file count."""
    document = {"format_version": FORMAT_VERSION, **asdict(receipt)}
    write_text_whole(receipt_path(data_path), _receipt_text(document))


def read_receipt(path: Path) -> Receipt:
    """Read and check one receipt.

    Raises:
        CorruptFileError: a byte of it is not what was written.
        DatasetError: it is of another format version.
    """
    remedy = "delete it and run the same precompute again"
    try:
        data = path.read_bytes()
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


def read_receipt_of(data_path: Path) -> Receipt | None:
    """The receipt of a data file; None unless both are there and the length is the one stated."""
    path = receipt_path(data_path)
    if not (data_path.exists() and path.exists()):
        return None
    receipt = read_receipt(path)
    return receipt if data_path.stat().st_size == receipt.data_bytes else None


def refuse_changed_source(receipt: Receipt, dataset: Path, source: Json) -> None:
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
