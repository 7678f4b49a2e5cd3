"""Checkpoints: diffusers folders plus the optimizer, without pickle, whole or not at all.

In `<run>/checkpoints/000300/`:

- `unet/` loads with `UNet2DConditionModel.from_pretrained`
- `unet_ema/` the same, averaged weights (where there are any)
- `scheduler/` the noise schedule of training
- `optimizer.safetensors`, `<parameter>.<moment>`
- `state.json` step, what the trainer needs to go on, length and sha256 of each other file, and a
  hash of itself. It is written last: without it a checkpoint does not count

In a sharded one the tensors lie in `pieces-00000-of-00002.safetensors` and so on, one from each
process, as `unet.<parameter>`, `unet_ema.<parameter>` and `optimizer.<parameter>.<moment>`. A
process holds some rows of a tensor along its first dimension; the file's metadata says from which
on, and the whole shape. `unet/` and `unet_ema/` then hold the configuration alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from shards.canonical import canonical_json, sha256_of
from shards.errors import UserError
from shards.retry import REMOTE
from shards.storage import (
    Location,
    download,
    is_remote,
    list_files,
    list_folders,
    local_copy,
    read_bytes,
    size_of,
    write_text_whole,
    write_whole,
)
from train.tensor_file import read_tensors, write_tensors

Json = dict[str, Any]
Fill = Callable[[Path], None]
Pieces = dict[str, tuple[int, list[int]]]

WEIGHTS = "diffusion_pytorch_model.safetensors"
STATE = "state.json"
_OPTIMIZER = "optimizer.safetensors"
_SEAL = "sha256_of_this"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A run between two steps, as one process holds it.

    Args:
        step: updates done.
        state: JSON that the trainer goes on from.
        unet_config: diffusers configuration.
        scheduler_config: of the diffusers scheduler that samples as was trained.
        weights: float32 masters by parameter.
        average: their moving average, where there is one.
        optimizer: `<parameter>.<moment>`; those without a dimension (counters) are always whole.
        pieces: of a sharded run, for each parameter the first row that this process holds and the
            whole tensor's shape; empty: the tensors are whole.
        process: which one this is.
        num_processes: that write pieces of this checkpoint.
    """

    step: int
    state: Json
    unet_config: Json
    scheduler_config: Json
    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, Tensor]
    pieces: Pieces = field(default_factory=dict)
    process: int = 0
    num_processes: int = 1

    def __post_init__(self) -> None:
        assert self.pieces or self.num_processes == 1, "whole tensors are one process's to save"

    @property
    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of `unet`, `unet_ema` (where there is one) and `optimizer`."""
        averaged = {} if self.average is None else {"unet_ema": self.average}
        return {"unet": self.weights, **averaged, "optimizer": self.optimizer}

    @property
    def is_on_gpu(self) -> bool:
        """Whether a copy goes to pinned memory."""
        return any(tensor.is_cuda for part in self.parts.values() for tensor in part.values())

    @property
    def num_bytes(self) -> int:
        """What `to_host` takes; pinned memory comes in powers of two."""
        sizes = [tensor.nbytes for part in self.parts.values() for tensor in part.values()]
        return sum(1 << (size - 1).bit_length() if self.is_on_gpu else size for size in sizes)

    def to_host(self) -> Snapshot:
        """A copy in the host's memory that training cannot change any more.

        From a GPU into pinned memory, so that the copies follow one another without a wait.
        """
        parts = {
            part: {name: _host_copy(tensor) for name, tensor in tensors.items()}
            for part, tensors in self.parts.items()
        }
        if self.is_on_gpu:
            torch.cuda.synchronize()
        return replace(
            self,
            state=deepcopy(self.state),
            weights=parts["unet"],
            average=parts.get("unet_ema"),
            optimizer=parts["optimizer"],
        )

    def files(self) -> dict[str, Fill]:
        """What this process writes, by name in the checkpoint; all but `state.json`."""
        files: dict[str, Fill] = {}
        if self.process == 0:
            files["scheduler/scheduler_config.json"] = _json_file(self.scheduler_config)
            for part in self.parts.keys() - {"optimizer"}:
                files[f"{part}/config.json"] = _json_file(self.unet_config)
        if self.pieces:
            files[f"{pieces_name(self.process, self.num_processes)}.safetensors"] = self._piece()
        else:
            for part, tensors in self.parts.items():
                files[_file_of(part)] = _tensor_file(tensors)
        return dict(sorted(files.items()))

    def _piece(self) -> Fill:
        tensors, layout = {}, {}
        for part, of_part in self.parts.items():
            for name, tensor in of_part.items():
                parameter = name.rpartition(".")[0] if part == "optimizer" else name
                tensors[f"{part}.{name}"] = tensor
                if tensor.ndim > 0 and parameter in self.pieces:
                    first, shape = self.pieces[parameter]
                    assert list(tensor.shape[1:]) == list(shape[1:]), name
                    layout[f"{part}.{name}"] = [first, list(shape)]
        return _tensor_file(tensors, pieces=json.dumps(layout))


def _host_copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.detach().clone()
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return copy.copy_(tensor.detach(), non_blocking=True)


def _json_file(document: Json) -> Fill:
    return partial(_write_text, text=canonical_json(document))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _tensor_file(tensors: dict[str, Tensor], **metadata: str) -> Fill:
    return partial(write_tensors, tensors=tensors, metadata={"format": "pt", **metadata})


def _file_of(part: str) -> str:
    return _OPTIMIZER if part == "optimizer" else f"{part}/{WEIGHTS}"


def pieces_name(process: int, num_processes: int) -> str:
    """`pieces-00000-of-00002`: what a process's files of a sharded checkpoint are called."""
    return f"pieces-{process:05d}-of-{num_processes:05d}"


def file_facts(path: Path) -> Json:
    """Length and hash of a local file, as `state.json` states them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def state_text(snapshot: Snapshot, files: dict[str, Json]) -> str:
    """The `state.json` that makes a checkpoint of these files count."""
    assert not snapshot.state.keys() & {"step", "files", _SEAL}
    document = {**snapshot.state, "step": snapshot.step, "files": files}
    return canonical_json({**document, _SEAL: _seal(document)})


def _seal(document: Json) -> str:
    return hashlib.sha256(canonical_json(document).encode()).hexdigest()


# Reading ------------------------------------------------------------------------------------------


def checkpoint_path(run: Location, step: int) -> Location:
    """Where the checkpoint of one step stands."""
    return run / "checkpoints" / f"{step:06d}"


def checkpoints_of(run: Location) -> list[Checkpoint]:
    """A run's whole checkpoints, oldest first.

    A local one gets its name when it is whole; behind a URL its `state.json` makes it count.
    """
    folders = step_folders(run)
    return [
        Checkpoint(one) for one in folders if not is_remote(one) or size_of(one / STATE) is not None
    ]


def step_folders(run: Location, suffix: str = "") -> list[Location]:
    """Folders that are named after a step, whole or not, in the order of the steps."""
    folder = run / "checkpoints"
    names = list_folders(folder)
    if isinstance(folder, Path) and folder.is_dir():  # some may lie elsewhere and be linked here
        names += [path.name for path in folder.iterdir() if path.is_symlink() and path.is_dir()]
    steps = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    steps = sorted((step for step in steps if step.isascii() and step.isdigit()), key=int)
    return [folder / f"{step}{suffix}" for step in steps]


class Checkpoint:
    """A whole checkpoint. What is read is held to the lengths and hashes in its `state.json`.

    All methods raise a `UserError` that names the damaged file where they find one, and a
    `StorageError` where the storage cannot be reached.

    Args:
        path: `<run>/checkpoints/000300`, local or behind a URL.
    """

    def __init__(self, path: Location) -> None:
        self.path = path

    @property
    def step(self) -> int:
        """Updates that were done."""
        return int(self.read_state()["step"])

    def read_state(self) -> Json:
        """What the trainer goes on from, and `step`."""
        return {name: value for name, value in self._document.items() if name != "files"}

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The whole tensors of `unet`, `unet_ema` or `optimizer`, on the CPU.

        Those of a sharded checkpoint are put together from its pieces.
        """
        if not self.is_sharded:
            return self._read(_file_of(part))[0]
        return self._merge(part)

    def read_json(self, name: str) -> Json:
        """One of the small files beside the tensors, such as `unet/config.json`."""
        with self._intact(name) as path:
            document: Json = json.loads(path.read_bytes())
        return document

    @property
    def is_sharded(self) -> bool:
        """Whether every process wrote its own piece."""
        return any(name.startswith("pieces-") for name in self._document["files"])

    def verify(self) -> None:
        """Read all files and hold them to what was written."""
        for name in self._document["files"]:
            with self._intact(name):
                pass

    @cached_property
    def _document(self) -> Json:
        """`state.json` without its seal."""
        try:
            document = json.loads(read_bytes(self.path / STATE))
            sealed = document.pop(_SEAL)
            wanted = _seal(document)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise self._broken(f"no {STATE}") from None
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise self._broken(f"{STATE} is not that of a run, {error!r}") from None
        if sealed != wanted:
            raise self._broken(f"{STATE} does not match its own hash")
        state: Json = document
        return state

    @contextmanager
    def _intact(self, name: str) -> Iterator[Path]:
        """A file as a local path, once its length and hash are what they should be."""
        wanted = self._document["files"].get(name)
        if wanted is None:
            raise self._broken(f"no {name}")
        # A transfer may be cut short, or damaged, without an error.
        for _ in range(REMOTE.attempts if is_remote(self.path) else 1):
            with ExitStack() as copies:
                try:
                    path = copies.enter_context(local_copy(self.path / name))
                    found = file_facts(path)
                except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                    raise self._broken(f"no {name}") from None
                if found == wanted:
                    yield path
                    return
        raise self._broken(f"{name}: {_facts(found)}", wanted=_facts(wanted))

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        with self._intact(name) as path:
            try:
                return read_tensors(path)
            except SafetensorError as error:
                raise self._broken(f"{name}: {error}") from None

    @cached_property
    def _pieces(self) -> list[tuple[dict[str, Tensor], Json]]:
        """Each process's tensors, mapped, with the first row and whole shape of those cut up."""
        names = [name for name in sorted(self._document["files"]) if name.startswith("pieces-")]
        files = (self._read(name) for name in names)
        return [(tensors, json.loads(metadata["pieces"])) for tensors, metadata in files]

    def _merge(self, part: str) -> dict[str, Tensor]:
        merged: dict[str, Tensor] = {}
        cut: defaultdict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        shapes: dict[str, list[int]] = {}
        for tensors, layout in self._pieces:
            for key, tensor in tensors.items():
                owner, _, name = key.partition(".")
                if owner != part:
                    continue
                if key in layout:
                    first, shapes[name] = layout[key]
                    cut[name].append((first, tensor))
                else:
                    merged[name] = tensor.clone()  # the same in every process
        merged |= {name: self._join(name, pieces, shapes[name]) for name, pieces in cut.items()}
        if not merged and part != "optimizer":  # which is empty before its first step
            raise self._broken(f"no {part}")
        return merged

    def _join(self, name: str, pieces: list[tuple[int, Tensor]], shape: list[int]) -> Tensor:
        """The rows of all pieces, which must follow one another."""
        pieces = sorted(pieces, key=lambda piece: piece[0])
        reached = 0
        for first, rows in pieces:
            if len(rows) and first != reached:
                break
            reached += len(rows)
        if reached != shape[0]:
            raise self._broken(f"{name}: no row {reached}", wanted=f"{shape[0]} rows")
        return torch.cat([rows for _, rows in pieces])

    def _broken(self, found: str, wanted: str = "") -> UserError:
        return UserError(
            self.path,
            f"not a whole checkpoint ({found})",
            wanted=wanted,
            remedy="delete this folder; the run then continues from the checkpoint before it",
        )


def _facts(facts: Json) -> str:
    return f"{facts['bytes']} bytes with sha256 {facts['sha256'][:12]}…"


# A U-Net for others -------------------------------------------------------------------------------


def save_unet(folder: Location, unet_config: Json, weights: dict[str, Tensor]) -> None:
    """Write a folder that `UNet2DConditionModel.from_pretrained` loads."""
    write_whole(folder / WEIGHTS, _tensor_file(weights))
    write_text_whole(folder / "config.json", canonical_json(unet_config))


def save_scheduler(folder: Location, scheduler_config: Json) -> None:
    """Write the schedule of training as a diffusers scheduler folder: sampling must agree."""
    write_text_whole(folder / "scheduler_config.json", canonical_json(scheduler_config))


def find_unet(run: Location, weights: str = "auto") -> Location:
    """The folder of a U-Net that a run, a checkpoint or an export holds; see `local_unet`.

    Args:
        run: a run folder, one of its checkpoints, or a folder with `unet/`.
        weights: `auto` (averaged where there are any), `ema` or `raw`.

    Raises:
        UserError: there is none of this kind.
    """
    kinds = {"auto": ("unet_ema", "unet"), "ema": ("unet_ema",), "raw": ("unet",)}[weights]
    # A run's own unet/ comes last: it may be an average, and of an end before the run was extended.
    for folder in [*(checkpoint.path for checkpoint in checkpoints_of(run)[::-1]), run]:
        for kind in kinds:
            if size_of(folder / kind / "config.json") is not None:
                return folder / kind
    raise UserError(
        run,
        f"no {'' if weights == 'auto' else weights + ' '}U-Net",
        wanted="the folder of a training run that has written a checkpoint",
        remedy="accelerate launch train/main.py --output-dir <run>",
    )


@contextmanager
def local_unet(folder: Location) -> Iterator[Path]:
    """A U-Net as diffusers can load it: its folder itself, or a copy that is gone afterwards.

    Args:
        folder: from `find_unet`. From behind a URL it is fetched; a sharded checkpoint's is put
            together.

    Raises:
        UserError: its checkpoint is damaged.
        StorageError: it cannot be fetched.
    """
    names = list_files(folder)
    is_bare = names.keys() == {"config.json"} and size_of(folder.parent / STATE) is not None
    if isinstance(folder, Path) and not is_bare:
        yield folder
        return
    with TemporaryDirectory(prefix="latentmill-") as scratch:
        if is_bare:
            export_unet(Checkpoint(folder.parent), Path(scratch), folder.name)
        else:
            for name in names:
                download(folder / name, Path(scratch) / name)
        yield Path(scratch)


def export_unet(checkpoint: Checkpoint, folder: Location, part: str = "unet") -> None:
    """Write the `unet` or `unet_ema` of any checkpoint, also a sharded one, for diffusers."""
    save_unet(folder, checkpoint.read_json(f"{part}/config.json"), checkpoint.tensors(part))


# The optimizer ------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """An optimizer's state as `<parameter>.<moment>`: its own tensors, not copies of them."""
    (group,) = optimizer.param_groups
    return {
        f"{name}.{key}": value.detach()
        for name, parameter in zip(names, group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]
) -> None:
    """Put such state back, copied, in the memory layout of the parameters.

    Layout matters: the update of a channels-last weight must meet channels-last moments.
    """
    (group,) = optimizer.param_groups
    keys = sorted({name.rpartition(".")[2] for name in tensors})
    state = {
        index: {key: _in_layout_of(parameter, tensors[f"{name}.{key}"]) for key in keys}
        for index, (name, parameter) in enumerate(zip(names, group["params"], strict=True))
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _in_layout_of(parameter: Tensor, saved: Tensor) -> Tensor:
    if saved.shape != parameter.shape:
        return saved.clone()  # no longer a map of the file
    return torch.empty_like(parameter, dtype=saved.dtype, device="cpu").copy_(saved)
