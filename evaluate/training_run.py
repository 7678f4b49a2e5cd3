"""What a run's own records say of its training: settings, model, data, and what it held out."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from shards.cache import bounded_cache
from shards.column import ImageColumn, TextColumn
from shards.dataset import Column, Dataset
from shards.epoch_record import EpochRecord
from shards.errors import DatasetError, UserError
from shards.held_out import HeldOut, choose_held_out
from shards.order import choose_partitions
from shards.reader import LatentReader
from shards.storage import Location, read_bytes
from train.config import TrainConfig

TRAINING = "training.json"  # a run's config.json, in an exported pipeline

Json = dict[str, Any]


@dataclass(frozen=True)
class TrainingData:
    """The columns that a run was trained on."""

    dataset: Dataset
    image: Column[ImageColumn]
    text: Column[TextColumn]


class TrainingRun:
    """The records of a run.

    Args:
        source: the run, one of its checkpoints, or a pipeline that was exported from it; local or
            behind a URL.
    """

    def __init__(self, source: Location) -> None:
        self._source = source

    @cached_property
    def record(self) -> Json:
        """The run's config.json; empty where there is none."""
        if self._record_path is None:
            return {}
        try:
            record: Json = dict(json.loads(read_bytes(self._record_path)))
        except (ValueError, TypeError) as error:
            raise UserError(self._record_path, f"not the record of a run ({error})") from None
        return record

    @cached_property
    def settings(self) -> TrainConfig:
        """The configuration of the run.

        Raises:
            UserError: it is not known.
        """
        found = self.record.get("settings")
        if not isinstance(found, dict):
            raise UserError(
                self._source,
                "its training is not known (no config.json with settings)",
                wanted="a run of train/main.py, one of its checkpoints, or an export of it",
            )
        known = {field.name for field in fields(TrainConfig)}
        try:
            return TrainConfig(**{name: value for name, value in found.items() if name in known})
        except (ValueError, TypeError) as error:
            raise UserError(self._record_path, f"not settings of a run ({error})") from None

    def model(self) -> str:
        """Model folder or hub id of the encoders that the run was trained with.

        Raises:
            UserError: nothing says which.
        """
        try:
            return self.settings.model or self.data.text.model
        except UserError as error:
            raise UserError(
                self._source,
                f"does not say which model its encoders are of ({error})",
                remedy="--model <folder or hub id>",
            ) from None

    def scheduler_config(self, unet: Location) -> Json:
        """The schedule of training, from beside the U-Net.

        Args:
            unet: the folder of the U-Net.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        for folder in (self._source, unet.parent):
            try:
                data = read_bytes(folder / "scheduler" / "scheduler_config.json")
            except FileNotFoundError:
                continue
            try:
                return dict(json.loads(data))
            except (ValueError, TypeError) as error:
                raise UserError(folder / "scheduler", f"not a schedule ({error})") from None
        raise UserError(unet.parent, "no scheduler/scheduler_config.json beside the U-Net")

    @cached_property
    def data(self) -> TrainingData:
        """The columns that the run was trained on.

        Raises:
            UserError: it was trained online, or they cannot be read.
        """
        return self.open_data(self.settings.data)

    def open_data(self, path: str) -> TrainingData:
        """The run's columns of a dataset, which may have moved; see `data`."""
        settings = self.settings
        if settings.online:
            raise UserError(self._source, f"was trained on images ({settings.online}), not latents")
        dataset = Dataset(path, bounded_cache(settings.cache_dir, settings.cache_gib))
        image = dataset.image_column(settings.resolution, settings.image_column)
        text = dataset.text_column(settings.text_column, settings.text)
        return TrainingData(dataset, image, text)

    def held_out(self, data: TrainingData) -> HeldOut:
        """The samples that the run was never trained on, exactly.

        Args:
            data: of this run; see `open_data`.

        Raises:
            UserError: it held out none, or the dataset is no longer the one that it was trained on.
        """
        settings = self.settings
        if settings.follow:
            path = self._run_folder / "epochs.jsonl"
            lines = EpochRecord(path, "").read()
            if not lines:
                found = "no epochs, which say what the run held out"
                raise UserError(path, found, wanted="the folder of the run itself")
            held_out = HeldOut(lines[0]["held_out"])
        else:
            held_out = choose_held_out(data.dataset, data.image, settings.validation_samples)
            if not self.is_trained_on(data):  # other shards might make another choice
                raise DatasetError(
                    data.dataset.path,
                    f"is not as {self._source} was trained on: other columns or shards, or other "
                    "samples held out",
                    wanted="the dataset of the run, unchanged",
                )
        if not len(held_out):
            raise UserError(
                self._source,
                f"held out no samples (--validation-samples {settings.validation_samples})",
                wanted="a run that did",
            )
        return held_out

    def is_trained_on(self, data: TrainingData) -> bool:
        """Whether the columns and their shards are those that the run has been trained on.

        Of a run that followed a growing dataset they may have become more.
        """
        settings, dataset = self.settings, data.dataset
        if settings.follow:
            return True
        flipped = dataset.flipped_column(data.image) if settings.flip_prob else None
        reader = LatentReader(
            dataset,
            data.image,
            data.text,
            seed=settings.seed,
            global_batch_size=settings.global_batch_size,
            num_partitions=choose_partitions(settings.global_batch_size, settings.num_partitions),
            window=settings.shuffle_window,
            held_out=choose_held_out(dataset, data.image, settings.validation_samples),
            flipped=flipped,
            flip_prob=settings.flip_prob,
        )
        return self.record.get("batches") in (reader.identity, f"encoded-{reader.identity}")

    @property
    def _run_folder(self) -> Location:
        """Of a run or of its checkpoint, the run."""
        # Of `.`, or of a link to a checkpoint, the name alone does not tell what it is in.
        source = self._source.resolve() if isinstance(self._source, Path) else self._source
        is_checkpoint = source.parent.name == "checkpoints"
        return source.parent.parent if is_checkpoint else self._source

    @cached_property
    def _record_path(self) -> Location | None:
        for path in (self._source / TRAINING, self._run_folder / "config.json"):
            try:
                read_bytes(path)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                continue
            return path
        return None
