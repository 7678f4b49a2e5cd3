"""A worker: the encoders on one device, and the threads that keep them fed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from precompute.decoding import DecodedShard, DecodePool, decode_sample
from precompute.filters import Filter
from precompute.shard_job import DecodedSamples, OpenDecoded, Tools, encode_shard
from precompute.shard_task import ShardTask
from precompute.transform import Crop
from precompute.worker_spec import ShardDone, WorkerSpec
from shards.column import ImageColumn, TextColumn
from shards.errors import UserError
from shards.image_shards import ShardStream
from shards.source_shard import SourceShard
from shards.storage import location


class Worker:
    """Encodes shards; `encode` may be called from `SHARDS_IN_HAND` threads at once.

    Args:
        spec: what to load and how to work.
        open_decoded: starts decoding a shard; default: in threads of this process.

    Raises:
        UserError: a part of the model cannot be loaded.
    """

    def __init__(self, spec: WorkerSpec, open_decoded: OpenDecoded | None = None) -> None:
        import torch

        from precompute.pixels import quieten_decoder

        quieten_decoder()
        self._num_threads = torch.get_num_threads()
        self._spec = spec
        self._pool = DecodePool(spec.decode_workers)
        self._tools = _load_tools(
            spec, open_decoded or partial(open_decoded_here, spec, self._pool)
        )

    def encode(
        self, task: ShardTask, on_samples: Callable[[int], object] = lambda _: None
    ) -> ShardDone:
        """Write what a shard lacks; see `encode_shard`."""
        import torch

        torch.set_num_threads(self._num_threads)  # OpenMP's number is each thread's own
        num_samples = 0

        def count(number: int) -> None:
            nonlocal num_samples
            num_samples += number
            on_samples(number)

        try:
            account = encode_shard(task, self._tools, count)
        except torch.OutOfMemoryError as error:
            raise UserError(
                "--batch-size",
                f"{self._spec.batch_size}: out of memory on {self._spec.device} "
                f"({str(error).splitlines()[0]})",
                remedy="a smaller --batch-size; what was written stays good",
            ) from None
        return ShardDone(num_samples, account.seconds)

    def close(self) -> None:
        """End the threads."""
        self._pool.close()


def open_decoded_here(
    spec: WorkerSpec, pool: DecodePool, source: SourceShard, crops: list[Crop]
) -> DecodedSamples:
    """Start decoding a shard in threads of this process."""
    decode = partial(decode_sample, crops=crops, wanted=Filter(spec.wanted))
    stream = ShardStream(source, spec.caption_field)
    return DecodedShard(stream, decode, pool, spec.decode_ahead)


def _load_tools(spec: WorkerSpec, open_decoded: OpenDecoded) -> Tools:
    import torch

    from precompute.image_encoder import ImageEncoder
    from precompute.loading import choose_device
    from precompute.shard_job import write_null
    from precompute.text_encoder import TextEncoder
    from precompute.text_rows import TEXT_BATCH_SIZE

    device, dtype = choose_device(spec.device), getattr(torch, spec.dtype)
    dataset, text = location(spec.dataset), {}
    for column in spec.columns:
        if isinstance(column, TextColumn):
            text[column.part] = TextEncoder(
                spec.model,
                device,
                dtype,
                column.part,
                tokenizer_only=not column.has_states,
                compiled_batch_size=TEXT_BATCH_SIZE if spec.compiled else None,
            )
            encoder = text[column.part]
            write_null(dataset, column, encoder, spec.model.name, compiled=spec.compiled)
    image = None
    if any(isinstance(column, ImageColumn) for column in spec.columns):
        compiled = spec.batch_size if spec.compiled else None
        image = ImageEncoder(spec.model, device, dtype, compiled_batch_size=compiled)
    return Tools(
        dataset=dataset,
        image=image,
        text=text,
        model_name=spec.model.name,
        wanted=Filter(spec.wanted),
        caption_field=spec.caption_field,
        batch_size=spec.batch_size,
        decode_workers=spec.decode_workers,
        open_decoded=open_decoded,
        compiled=spec.compiled,
    )
