"""The arms of online against offline: one model, one loop, one order of samples, four sources.

An arm is a trainer with a source of batches of its own; the U-Net, its optimizer and its average
are the same object in all of them. The learning rate is 0: an update does all of its work, and the
weights stay what they are, so that the same step has the same loss in every arm.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from benchmarks.equal_work import WatchedSource, check_equal_batches, check_equal_losses
from shards.batch import BatchSource, LatentBatch
from shards.column import ImageColumn, TextColumn
from shards.dataset import Column, Dataset
from shards.errors import DatasetError, UserError
from shards.order import choose_partitions
from shards.reader import LatentReader
from train.config import TrainConfig
from train.metrics import read_metrics

if TYPE_CHECKING:
    import torch

    from precompute.online import OnlineBatches
    from train.model import Model
    from train.trainer import Trainer

ArmName = Literal["resident", "offline", "ids", "online"]
MEANING = {
    "resident": "U-Net only: batches wait in the device's memory",
    "offline": "from latent shards: moments and text states",
    "ids": "from latent shards: moments and token ids; the text encoder runs along",
    "online": "from image shards: read, decode, VAE, text encoder",
}
# Relative, of the mean loss of a block: for what float16 takes in the cache, and for sums that come
# in another order; in low precision more of them do.
_LOSS_TOLERANCE = {"no": 1e-4}
_LOW_PRECISION_TOLERANCE = 1e-3


class ResidentBatches:
    """A `BatchSource` that reads `num_steps` batches at a time to the device, then serves them.

    Args:
        reader: where they come from.
        device: where they wait.
        num_steps: so many are read in one go, when the first of them is asked for.
    """

    def __init__(self, reader: LatentReader, device: torch.device, num_steps: int) -> None:
        self._reader, self._device, self._num_steps = reader, device, num_steps
        self.latent_shape = reader.latent_shape
        self.scaling_factor = reader.scaling_factor
        self.identity = f"resident-{reader.identity}"

    @cached_property
    def null_states(self) -> np.ndarray:
        """States of the empty caption, [T, D]."""
        return self._reader.null_states

    def epoch_at(self, step: int) -> float:
        """Epochs completed when `step` steps are done."""
        return self._reader.epoch_at(step)

    def keys_of(self, samples: np.ndarray) -> list[str]:
        """`<shard>/<key>` of samples by their numbers."""
        return self._reader.keys_of(samples)

    def iter_batches(self, first_step: int, positions: range) -> Iterator[LatentBatch]:
        """The reader's batches, on the device."""
        while True:
            steps = range(first_step, first_step + self._num_steps)
            yield from [self._load(self._reader.gather(step, positions)) for step in steps]
            first_step = steps.stop

    def _load(self, batch: LatentBatch) -> LatentBatch:
        from train.transfer import to_device

        # A copy: the reader uses a batch's memory again, and on a CPU "to the device" is no copy.
        moments, states = (
            to_device(stored, self._device).clone() for stored in (batch.moments, batch.states)
        )
        return replace(batch, moments=moments, states=states)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the arms read of a dataset.

    Args:
        dataset: open.
        image: moments.
        text: states.
        token_ids: token ids alone, for the text encoder in the loop; None: see `no_token_ids`.
        no_token_ids: why there are none.
    """

    dataset: Dataset
    image: Column[ImageColumn]
    text: Column[TextColumn]
    token_ids: Column[TextColumn] | None
    no_token_ids: str = ""


def open_columns(dataset: Dataset, config: TrainConfig) -> Columns:
    """The columns of a preset's resolution, held against its U-Net.

    Raises:
        DatasetError: they are not there, or do not fit.
    """
    from train.unet import check_fits, load_unet_config

    image = dataset.image_column(config.resolution, config.image_column)
    text = dataset.text_column(config.text_column, "states")
    check_fits(load_unet_config(config.unet), image, text)
    found = Columns(dataset=dataset, image=image, text=text, token_ids=None)
    try:
        return replace(found, token_ids=dataset.text_column(holding="ids"))
    except DatasetError as error:
        hint = "precompute with --resolutions none --text ids adds a column of token ids"
        return replace(found, no_token_ids=f"{error} ({hint})")


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How an arm is timed.

    Args:
        blocks: of each arm.
        warmup: steps before each block that are not timed.
        steps: timed steps of a block.
    """

    blocks: int
    warmup: int
    steps: int

    @property
    def length(self) -> int:
        """Steps of a block with its warm-up."""
        return self.warmup + self.steps


@dataclass(frozen=True)
class Timed:
    """A block.

    Args:
        sec_per_step: mean over its timed steps.
        data_wait_frac: share of that in which the loop waited for its source. On a CPU, and on a
            GPU as far as the host is held up, that is where the encoders of `ids` and `online` run.
        loss: mean over the timed steps.
    """

    sec_per_step: float
    data_wait_frac: float
    loss: float


class Arms:
    """The arms that can run, with the one model that they share.

    Args:
        config: the run.
        columns: what is read.
        names: which arms.
        blocks: how they are timed.
        scratch: for their logs.

    Attributes:
        not_measured: why an arm that was asked for cannot run.

    Raises:
        UserError: a source cannot be opened.
    """

    def __init__(
        self,
        config: TrainConfig,
        columns: Columns,
        names: tuple[ArmName, ...],
        blocks: Blocks,
        scratch: Path,
    ) -> None:
        from train.trainer import build_accelerator

        self._columns, self._blocks, self._scratch = columns, blocks, scratch
        num_steps = blocks.blocks * blocks.length
        self._config = replace(
            config,
            learning_rate=0.0,
            ema_start_step=0,
            max_steps=num_steps,
            log_every=num_steps + 1,
            checkpoint_every=num_steps + 1,
        )
        self.accelerator = build_accelerator(self._config)
        self.not_measured: dict[str, str] = {}
        if "ids" in names and columns.token_ids is None:
            self.not_measured["ids"] = columns.no_token_ids
        wanted = [name for name in names if name not in self.not_measured]
        if not wanted:
            raise UserError("--arms", f"{' '.join(names)}: {self.not_measured['ids']}")
        self.sources: dict[str, WatchedSource] = {
            name: WatchedSource(self._open(name), blocks.length) for name in wanted
        }
        self.trainers = self._build_trainers()
        precision = self.model.precision.name
        self._loss_tolerance = _LOSS_TOLERANCE.get(precision, _LOW_PRECISION_TOLERANCE)
        specs = columns.image.spec, columns.text.spec
        self._storage = specs[0].storage_dtype, specs[1].storage_dtype

    @property
    def model(self) -> Model:
        """The one of all arms."""
        return next(iter(self.trainers.values())).model

    def _build_trainers(self) -> dict[str, Trainer]:
        from train.trainer import Trainer

        trainers: dict[str, Trainer] = {}
        model = None
        for name, source in self.sources.items():
            config = replace(self._config, output_dir=str(self._scratch / name))
            trainers[name] = Trainer(config, source, self.accelerator, model=model)
            model = trainers[name].model
        return trainers

    # Sources -------------------------------------------------------------------------------------

    def _open(self, name: ArmName) -> BatchSource:
        if name == "online":
            return self.open_online()
        if name == "ids":
            from precompute.encoded_text import EncodedText

            token_ids, device = self._columns.token_ids, self.accelerator.device
            assert token_ids is not None
            return EncodedText(
                self._open_reader(token_ids),
                token_ids,
                device=device,
                compiled_share=self._compiled_share(),
            )
        reader = self._open_reader(self._columns.text)
        if name == "resident":
            return ResidentBatches(reader, self.accelerator.device, self._blocks.length)
        return reader

    def open_online(self) -> OnlineBatches:
        """The source of the online arm; its encoders are those of stage 1."""
        from precompute.online import OnlineBatches
        from precompute.online_samples import samples_of_dataset

        columns = self._columns
        reader = self._open_reader(columns.text)
        return OnlineBatches(
            samples_of_dataset(reader, columns.image, columns.dataset.caption_field),
            columns.image,
            columns.text,
            device=self.accelerator.device,
            num_workers=os.cpu_count() or 1,
            compiled_share=self._compiled_share(),
        )

    def _compiled_share(self) -> int | None:
        """Encoders are compiled where the U-Net is, as `train/main.py` does it."""
        from train.step_plan import resolve_compile

        mode, _ = resolve_compile(self._config, self.accelerator.device)
        return None if mode == "off" else self._config.global_batch_size

    def _open_reader(self, text: Column[TextColumn]) -> LatentReader:
        from train.main import pinned_empty

        on_gpu = self.accelerator.device.type == "cuda"
        return LatentReader(
            self._columns.dataset,
            self._columns.image,
            text,
            seed=self._config.seed,
            global_batch_size=self._config.global_batch_size,
            num_partitions=choose_partitions(self._config.global_batch_size),
            allocate=pinned_empty if on_gpu else None,
        )

    # Blocks --------------------------------------------------------------------------------------

    def run(self) -> dict[str, list[Timed]]:
        """Time every arm's blocks, in turns, so that what slows the machine slows all arms.

        Raises:
            UserError: two arms did not do the same work; no time is reported then.
        """
        timed: dict[str, list[Timed]] = {name: [] for name in self.trainers}
        for block in range(self._blocks.blocks):
            for name in self.trainers:
                timed[name].append(self._time(name, block))
            served = {name: source.take() for name, source in self.sources.items()}
            check_equal_batches(served, self._columns.image.spec.latent_shape[0], self._storage)
            losses = {name: found[block].loss for name, found in timed.items()}
            check_equal_losses(losses, self._loss_tolerance, block)
            speeds = ", ".join(f"{n} {1 / t[-1].sec_per_step:.3g} it/s" for n, t in timed.items())
            print(f"block {block + 1}/{self._blocks.blocks}: {speeds}", flush=True)
        return timed

    def _time(self, name: str, block: int) -> Timed:
        trainer, end = self.trainers[name], (block + 1) * self._blocks.length
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.run(end - self._blocks.steps)
            began = time.perf_counter()
            trainer.run(end)  # ends with a synchronisation
            seconds = time.perf_counter() - began
        row = read_metrics(self._scratch / name / "metrics.jsonl")[-1]
        assert row["step"] == end
        return Timed(seconds / self._blocks.steps, row["perf/data_wait_frac"], row["train/loss"])

    def close(self) -> None:
        """Stop what reads ahead."""
        for trainer in self.trainers.values():
            trainer.close()
