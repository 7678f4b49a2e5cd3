"""FID, KID and CLIP score of a run in progress, on a few samples that it is never trained on.

The reference are held-out latents decoded by the VAE, and prompts are their captions. So the
figures are *against reconstructions*: what the VAE loses is on both sides, and they come out lower
than against the source images, which stage 2 never sees. With as few images as there is time for,
FID is mostly bias: it says how a run gets on, and nothing about another protocol's figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from evaluate.run_pipeline import RunPipeline
from shards.batch import BatchSource, LatentBatch
from shards.dataset import Dataset
from shards.errors import UserError
from shards.layout import ledger_path
from shards.ledger import read_ledger

if TYPE_CHECKING:
    from torch import Tensor

    from evaluate.pictures import PictureBatch
    from evaluate.reference import Reference
    from train.config import TrainConfig
    from train.trainer import Trainer

_BATCH_SIZE = 8  # beside a model in training there is less memory than usual

Captions = Callable[[np.ndarray], list[str]]


class HeldOutSource(Protocol):
    """A source that keeps samples apart."""

    num_held_out: int

    def iter_held_out(self, first: int, last: int, batch_size: int) -> Iterator[LatentBatch]:
        """See `LatentReader.iter_held_out`."""
        ...


def build_run_metrics(
    config: TrainConfig, model: str, batches: BatchSource, held_out: HeldOutSource | None
) -> RunMetrics:
    """The observer that `--eval-images` asks for.

    Args:
        config: the run's.
        model: folder or hub id of the encoders.
        batches: what is trained on; names samples.
        held_out: what is not; None online.

    Raises:
        UserError: nothing is held out, or see `RunMetrics`.
    """
    if held_out is None:
        raise UserError("--eval-images", "--online holds nothing out", remedy="--eval-images 0")
    dataset = Dataset(config.data)
    return RunMetrics(
        config, model, held_out, lambda samples: captions_of(dataset, batches.keys_of(samples))
    )


class RunMetrics:
    """An `Observer` that generates from held-out captions and measures what comes out.

    Averaged weights are measured where there are any (`eval/ema_fid_g3`), else those in training
    (`eval/fid_g3`). The image of the n-th caption starts from the noise of seed + n, at every
    measurement. The main process does it all while the others wait: their collective must outlive
    that (`--eval-images` for seconds, not for hours).

    Args:
        config: the run's: `eval_images` images at each scale of `eval_guidance`.
        model: model folder or hub id of VAE and text encoder.
        source: of held-out samples.
        captions: captions of samples by their numbers.

    Raises:
        UserError: fewer than two samples are held out, or a network is not there.
    """

    def __init__(
        self, config: TrainConfig, model: str, source: HeldOutSource, captions: Captions
    ) -> None:
        from evaluate.feature_networks import load_feature_network

        self.every = config.eval_every
        self._config, self._source, self._captions = config, source, captions
        self._num_reference = min(config.eval_images, source.num_held_out)
        if self._num_reference < 2:
            raise UserError(
                "--eval-images",
                f"{source.num_held_out} samples are held out to compare {config.eval_images} with",
                wanted="at least 2 of both",
                remedy="--validation-samples 512, or --eval-images 0",
            )
        # What is missing is said before the run, not after an hour of it.
        load_feature_network(config.eval_features)
        self._pipeline = RunPipeline(model)
        self._reference: Reference | None = None
        self._prompts: list[str] = []
        self._has_failed = False

    def observe(self, trainer: Trainer) -> dict[str, float]:
        """`eval/fid_g3`, `eval/kid_g3`, `eval/clip_score_g3`: of each scale, on every process."""
        from accelerate.utils import broadcast_object_list

        kind = "raw" if trainer.model.average is None else "ema"
        weights = trainer.model.weights_on_host(kind)
        figures = {} if weights is None else self._try_to_measure(trainer, kind, weights)
        if trainer.accelerator.num_processes > 1:
            figures = broadcast_object_list([figures])[0]
        if figures:
            values = " | ".join(f"{name} {value:.4f}" for name, value in figures.items())
            trainer.accelerator.print(f"step {trainer.step} | {values}")
        return figures

    def _try_to_measure(
        self, trainer: Trainer, kind: str, weights: dict[str, Tensor]
    ) -> dict[str, float]:
        """A model that cannot be loaded, or no memory for it, is no reason to stop a run."""
        import torch

        if self._has_failed:
            return {}
        try:
            with self._pipeline.around(trainer, weights) as pipeline:
                return self._measure(trainer, kind, pipeline)
        except (UserError, torch.OutOfMemoryError) as error:
            self._has_failed = True
            reason = str(error).splitlines()[0]
            trainer.accelerator.print(f"no metrics from now on: {reason}")
            return {}

    def _measure(self, trainer: Trainer, kind: str, pipeline: Any) -> dict[str, float]:
        from evaluate.feature_networks import load_feature_network
        from evaluate.metrics import collect_features, measure
        from evaluate.reference import Reference

        config = self._config
        network = load_feature_network(config.eval_features, trainer.device)
        if self._reference is None:
            decoded = collect_features(self._iter_decoded(pipeline, trainer), network)
            self._reference = Reference(decoded.features)
        prefix = "eval/" if kind == "raw" else f"eval/{kind}_"
        figures = {}
        for scale in config.eval_guidance:
            clip = getattr(network, "clip", None)
            pictures = self._iter_generated(pipeline, scale)
            result = measure(collect_features(pictures, network, clip), self._reference)
            figures[f"{prefix}fid_g{scale:g}"] = result["fid"]
            figures[f"{prefix}kid_g{scale:g}"] = result["kid"]["mean"]
            if clip is not None:
                figures[f"{prefix}clip_score_g{scale:g}"] = result["clip_score"]
        return figures

    def _iter_decoded(self, pipeline: Any, trainer: Trainer) -> Iterator[PictureBatch]:
        """Held-out samples, decoded from the mean of their posterior; notes their captions."""
        import torch

        from evaluate.pictures import PictureBatch
        from train.transfer import to_device

        self._prompts = []
        channels = pipeline.vae.config.latent_channels
        batches = self._source.iter_held_out(0, self._num_reference, _BATCH_SIZE)
        for batch in batches:
            means = to_device(batch.moments, trainer.device)[:, :channels].float()
            with torch.inference_mode():
                decoded = pipeline.vae.decode(means).sample
            pixels = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
            captions = self._captions(batch.samples)
            self._prompts += captions
            yield PictureBatch(pixels, captions)

    def _iter_generated(self, pipeline: Any, scale: float) -> Iterator[PictureBatch]:
        import torch

        from evaluate.pictures import PictureBatch
        from evaluate.sample import Sampling, sample_batch

        config = self._config
        how = Sampling(num_steps=config.eval_steps, guidance_scale=scale)
        numbers = range(config.eval_images)
        for start in numbers[::_BATCH_SIZE]:
            part = numbers[start : start + _BATCH_SIZE]
            captions = [self._prompts[number % len(self._prompts)] for number in part]
            seeds = [config.seed + number for number in part]
            images = np.stack(sample_batch(pipeline, captions, seeds, how))
            yield PictureBatch(torch.from_numpy(images).permute(0, 3, 1, 2), captions)


def captions_of(dataset: Dataset, keys: Sequence[str]) -> list[str]:
    """Captions of samples that are named `<shard>/<key>`, from the ledgers of a dataset."""
    named = [key.split("/", 1) for key in keys]
    captions: dict[str, dict[str, str]] = {}
    for shard in {shard for shard, _ in named}:
        rows = read_ledger(ledger_path(dataset.path, shard))
        captions[shard] = {row["key"]: row["caption"] or "" for row in rows}
    return [captions[shard][key] for shard, key in named]
