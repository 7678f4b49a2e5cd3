"""TensorBoard, W&B and trackio through Accelerate, beside metrics.jsonl.

A resumed run goes on in the same run of each tracker, and no row is there twice. TensorBoard is
told from which step on earlier rows are void. W&B and trackio cannot take rows back, but a resumed
run computes the same figures again: it leaves out those up to the last step that they were given.
"""

from __future__ import annotations

import importlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
from accelerate import Accelerator

from shards.canonical import canonical_json
from shards.errors import StorageError, UserError
from shards.storage import Location, is_remote, read_bytes, write_text_whole
from train.config import TrainConfig

TRACKERS = ("tensorboard", "wandb", "trackio")
_PROJECT = "latentmill"
_HPARAMS = "hparams.yml"  # what Accelerate writes beside the settings' own event file


def accelerator_options(names: str, run_dir: Location) -> dict[str, Any]:
    """What `Accelerator` must be given when it is made.

    Args:
        names: trackers, comma-separated.
        run_dir: of the run.

    Raises:
        UserError: an unknown tracker; one that is not installed, which Accelerate would leave out
            without a word; TensorBoard, whose files grow, for a run on an object store.
    """
    chosen = _parse(names)
    if "tensorboard" in chosen and is_remote(run_dir):
        raise UserError(
            "--trackers",
            f"tensorboard appends to files, which {run_dir} cannot",
            remedy="a local --output-dir, or --trackers wandb; metrics.jsonl is written anyway",
        )
    return {"log_with": chosen, "project_dir": str(run_dir / "tensorboard")} if chosen else {}


def _parse(names: str) -> list[str]:
    from accelerate.tracking import get_available_trackers

    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in chosen:
        if name not in TRACKERS:
            raise UserError("--trackers", repr(name), wanted=f"some of {', '.join(TRACKERS)}")
        if name not in installed:
            raise UserError("--trackers", f"{name} is not installed", remedy=f"pip install {name}")
    return chosen


class Trackers:
    """The trackers of a run; does nothing without names, and on all processes but the main one.

    Args:
        names: trackers, comma-separated.
        config: shown with the run.
        run_dir: TensorBoard's files are put into `tensorboard/`; `trackers.json` says which run of
            the others this one is.
        accelerator: made with `accelerator_options`.
        step: that the run continues from; at 0 it is a new run.
    """

    def __init__(
        self,
        names: str,
        config: TrainConfig,
        run_dir: Location,
        accelerator: Accelerator,
        step: int,
    ) -> None:
        self._state_path = run_dir / "trackers.json"
        self._state, self._told_step = _new_state(), 0
        self._trackers: list[Any] = []
        self._accelerator, self._has_warned = accelerator, False
        if _parse(names) and accelerator.is_main_process:
            self._start(config, run_dir, accelerator, step)

    def _start(
        self, config: TrainConfig, run_dir: Location, accelerator: Accelerator, step: int
    ) -> None:
        if step:
            self._state = self._read_state()
        self._told_step = self._state["step"]
        write_text_whole(self._state_path, canonical_json(self._state))
        assert accelerator.log_with, "made without accelerator_options"
        options = _init_options(run_dir, self._state["id"], step)
        accelerator.init_trackers(_PROJECT, init_kwargs=options)
        self._trackers = accelerator.trackers
        settings = _flat(config)
        for tracker in self._trackers:
            if tracker.name != "tensorboard" or not _has_settings(run_dir):
                tracker.store_init_configuration(settings)

    def log(self, row: dict[str, float], step: int) -> None:
        """Hand on a row of figures."""
        figures = {name: value for name, value in row.items() if name != "step"}
        for tracker in self._awaiting(step):
            with self._given_up_on_failure(tracker):
                tracker.log(figures, step=step)
        self._note(step)

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        """Hand on an image.

        Args:
            name: of the image, the same at every step.
            image: [H, W, 3] uint8.
            step: that it belongs to.
        """
        for tracker in self._awaiting(step):
            with self._given_up_on_failure(tracker):
                _log_image(tracker, name, image, step)
        self._note(step)

    def close(self) -> None:
        """Write what is left and end the trackers' runs."""
        for tracker in list(self._trackers):
            with self._given_up_on_failure(tracker):
                tracker.finish()
        self._trackers.clear()  # Accelerate's own list: `end_training` would finish them again

    @contextmanager
    def _given_up_on_failure(self, tracker: Any) -> Iterator[None]:
        """A full disk or a service that is down costs the tracker, not the run."""
        try:
            yield
        except OSError as error:
            self._trackers.remove(tracker)  # TensorBoard's thread has ended: it takes no more rows
            self._accelerator.print(
                f"warning: {tracker.name} is told no more until the run is resumed ({error}). "
                "Training goes on; metrics.jsonl has all figures"
            )

    def _awaiting(self, step: int) -> list[Any]:
        """The trackers that have not been told of a step by the run before."""
        is_told = step <= self._told_step
        return [t for t in self._trackers if t.name == "tensorboard" or not is_told]

    def _note(self, step: int) -> None:
        if self._trackers and step > self._state["step"]:
            self._state["step"] = step
            try:
                write_text_whole(self._state_path, canonical_json(self._state))
            except StorageError as error:  # the next row tries again
                if not self._has_warned:
                    self._accelerator.print(f"warning: {error}. Training goes on")
                self._has_warned = True

    def _read_state(self) -> dict[str, Any]:
        """Which run this is and the last step that was logged.

        Raises:
            UserError: the file is not ours.
        """
        try:
            state = json.loads(read_bytes(self._state_path))
            return {"id": str(state["id"]), "step": int(state["step"])}
        except FileNotFoundError:
            return _new_state()  # trackers may be added to a run at any time
        except (ValueError, TypeError, KeyError):
            raise UserError(
                self._state_path,
                "not a record of trackers",
                remedy="delete it; the run then appears in W&B and trackio as a new one",
            ) from None


def _log_image(tracker: Any, name: str, image: np.ndarray, step: int) -> None:
    if tracker.name == "tensorboard":
        tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")
    elif tracker.name == "wandb":
        tracker.log_images({name: [image]}, step=step)
    else:  # Accelerate logs no images to trackio
        trackio_image = importlib.import_module("trackio").Image(image)
        tracker.log({name: trackio_image}, step=step)


def _new_state() -> dict[str, Any]:
    return {"id": secrets.token_hex(4), "step": 0}


def _init_options(run_dir: Location, run_id: str, step: int) -> dict[str, dict[str, Any]]:
    """For each tracker what it needs to go on where the run before it stopped."""
    own_folder = {} if is_remote(run_dir) else {"dir": str(run_dir)}
    return {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"id": run_id, "name": run_dir.name, "resume": "allow", **own_folder},
        "trackio": {"name": f"{run_dir.name}-{run_id}", "resume": "allow"},
    }


def _flat(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """Settings as the trackers take them."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in asdict(config).items()
    }


def _has_settings(run_dir: Location) -> bool:
    """Whether TensorBoard shows the settings already; each time would be another line there."""
    return any((run_dir / "tensorboard").rglob(_HPARAMS))
