"""A SageMaker training job: channels and hyperparameters in, a checkpoint and a pipeline out.

Checkpoints go to the job's checkpoint folder, which SageMaker keeps in step with S3 and fills again
when it starts the job anew (a spot instance that went, an internal error): the trainer finds the
last one there and goes on. At the end the model folder gets a diffusers pipeline, which an endpoint
of the same image serves.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from deploy.launch import Nodes, num_devices, trainer_command
from deploy.sagemaker.environment import Environment, output_dir, read_environment
from deploy.sagemaker.hyperparameters import trainer_flags
from shards.errors import UserError
from shards.storage import is_remote, location, write_text_whole

# Input channels, and the trainer's flag that each stands for.
CHANNELS = {"latents": "data", "model": "model", "init": "init_from"}
_REASON_CHARS = 1024  # of a failure that SageMaker shows
_TAIL_LINES = 40
# SageMaker kills two minutes after it has asked; what torchrun starts must be done before.
_SHUTDOWN_SEC = 110


def main() -> int:
    """Train as SageMaker says; returns the container's exit status."""
    try:
        return run(read_environment(os.environ))
    except UserError as error:
        sys.stderr.write(f"train: error: {error}\n")
        _tell_failure(output_dir(os.environ), f"train: error: {error}")
        return 2


def run(environment: Environment) -> int:
    """Train, then hand the model over.

    Raises:
        UserError: channels or hyperparameters that the trainer cannot take.
    """
    settings = settings_of(environment)
    max_restarts = settings.pop("max_restarts", "0")
    if not max_restarts.isdecimal():
        wanted = "a number, 0 or more"
        raise UserError("hyperparameter max_restarts", repr(max_restarts), wanted=wanted)
    command = trainer_command(
        trainer_flags(settings),
        num_processes=environment.num_gpus or num_devices(),
        nodes=Nodes(len(environment.hosts), environment.rank, environment.hosts[0]),
        max_restarts=int(max_restarts),
    )
    trainer = _Trainer(command, {**os.environ, **trainer_variables(environment)})
    status = trainer.wait()
    if trainer.stopped:
        _say(f"stopped; the last checkpoint is in {settings['output_dir']}")
        return 0
    if status:
        _tell_failure(environment.output_dir, trainer.reason(status))
        return status if status > 0 else 128 - status
    if environment.rank == 0:
        hand_over(settings["output_dir"], settings.get("model", ""), environment.model_dir)
    return 0


def settings_of(environment: Environment) -> dict[str, str]:
    """Hyperparameters, and what channels and folders say, as settings of the trainer.

    Raises:
        UserError: a channel that nothing reads, a setting that a channel gives as well, no latents,
            or a run that several machines cannot share.
    """
    settings = {
        name.replace("-", "_"): value for name, value in environment.hyperparameters.items()
    }
    for channel, folder in environment.channels.items():
        if channel not in CHANNELS:
            wanted = f"some of {', '.join(CHANNELS)}"
            raise UserError(f"channel {channel}", "nothing reads it", wanted=wanted)
        setting = CHANNELS[channel]
        if setting in settings:
            raise UserError(f"channel {channel}", f"hyperparameter {setting} says the same")
        settings[setting] = str(folder)
    if not settings.get("data") and not settings.get("online"):
        raise UserError(
            "channels", "no latents", remedy="channel latents, or hyperparameter data=s3://..."
        )
    own = settings.setdefault("output_dir", str(environment.checkpoint_dir))
    if len(environment.hosts) > 1 and not is_remote(location(own)):
        _check_shared(settings)
    return settings


def _check_shared(settings: Mapping[str, str]) -> None:
    """Machines have a checkpoint folder each: only the first one's has the run's checkpoints."""
    for name, default in (("max_restarts", "0"), ("checkpoint_format", "full")):
        if settings.get(name, default) != default:
            raise UserError(
                f"hyperparameter {name}={settings[name]}",
                "several machines, and each has a checkpoint folder of its own",
                remedy="output_dir=s3://...; SageMaker's own retries need no max_restarts",
            )


def trainer_variables(environment: Environment) -> dict[str, str]:
    """What the processes are told beside their flags; what is set already stays."""
    wanted = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_SEC), "NCCL_DEBUG": "WARN"}
    if environment.network_interface:
        wanted["NCCL_SOCKET_IFNAME"] = environment.network_interface
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


class _Trainer:
    """The trainer's process, or torchrun's: its stderr is shown, and its end remembered.

    Args:
        command: what to run.
        variables: its environment.
    """

    def __init__(self, command: list[str], variables: Mapping[str, str]) -> None:
        self.stopped = False
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._before: dict[int, Any] = {}
        _say(" ".join(command))
        self._process = subprocess.Popen(
            command, env=variables, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Until it has ended; its status."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            self._tail.append(line)
        status = self._process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        return status

    def reason(self, status: int) -> str:
        """Why it failed: our own error where there is one, else the end of what it said."""
        for line in self._tail:
            if line.startswith("train: error:"):
                return line.strip()
        return f"status {status}; it ended with\n" + "".join(self._tail)[-_REASON_CHARS + 100 :]


def hand_over(run_dir: str, model: str, model_dir: Path) -> None:
    """Fill the model folder with a pipeline, or, where its other parts are missing, the U-Net.

    Args:
        run_dir: with the checkpoints; a folder or URL.
        model: folder or hub id of VAE and text encoder; empty: the one that the run names.
    """
    # The model folder is a mount, there already: nothing can take its name.
    whole = model_dir / "pipeline"
    command = [sys.executable, "-m", "evaluate", "export", "--run", run_dir]
    command += ["--out", str(whole), *(["--model", model] if model else [])]
    if subprocess.run(command, check=False).returncode == 0:
        for entry in whole.iterdir():
            entry.rename(model_dir / entry.name)
        whole.rmdir()
        _say(f"{model_dir} has a pipeline")
        return
    from train.checkpoint import checkpoints_of

    newest = checkpoints_of(location(run_dir))[-1].path
    if not isinstance(newest, Path):
        raise UserError(model_dir, f"no pipeline could be exported; the checkpoint is in {newest}")
    for part in ("unet", "unet_ema", "scheduler"):
        if (newest / part).is_dir():
            shutil.copytree(newest / part, model_dir / part, dirs_exist_ok=True)
    _say(f"{model_dir} has the U-Net alone: give the job a channel `model` for a pipeline")


def _tell_failure(folder: Path, reason: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(folder / "failure", reason[:_REASON_CHARS])


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
