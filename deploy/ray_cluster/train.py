"""Stage 2 on the trainer pool of a Ray cluster: torchrun on each machine that has `trainer`.

python -m deploy.ray_cluster.train --nodes 4 -- sd2-base-256 --data s3://... --output-dir s3://...

Ray finds and keeps the machines; the processes on them are torchrun's. A machine that is lost, or a
failure on one, ends the others, and the run goes on from its last checkpoint on what Ray gives it
next. The machines have this repository and its packages installed: the image does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from deploy.launch import Nodes, num_devices, trainer_command
from precompute.ray_cluster import expect_listener, import_ray
from shards.errors import UserError, reported
from shards.stop import StopOnSignal

_TRAINER = "trainer"
_TICK_SEC = 1.0
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_PROGRAM = "python -m deploy.ray_cluster.train"
# What the user must put right; `shards.errors.reported` ends with it.
_USER_ERROR = 2


@dataclass(frozen=True, kw_only=True)
class RayTrainConfig:
    """Where to train; arguments of train/main.py follow after `--`."""

    nodes: int = 1
    """Machines with the resource `trainer`; waits until the cluster has as many."""
    processes: int = 0
    """On each of them; 0: one for each GPU."""
    ray_address: str = "auto"
    """Of the cluster: auto, or host:port."""
    max_failures: int = 3
    """Go on from the last checkpoint after a failure, this many times."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m deploy.ray_cluster.train`."""
    arguments = sys.argv[1:] if argv is None else argv
    split = arguments.index("--") if "--" in arguments else len(arguments)
    config = tyro.cli(RayTrainConfig, args=arguments[:split], prog=_PROGRAM, description=__doc__)
    with reported("train"):
        run(config, arguments[split + 1 :])


def run(config: RayTrainConfig, arguments: list[str]) -> None:
    """Train until the run is finished, stopped, or has failed too often.

    Raises:
        UserError: no Ray, no cluster, or no more attempts.
    """
    ray = import_ray(_PROGRAM)
    if not arguments:
        raise UserError("--", "nothing after it", wanted="arguments of train/main.py")
    expect_listener(config.ray_address)
    try:
        ray.init(address=config.ray_address, logging_level="ERROR")
    except ConnectionError as error:
        raise UserError(f"--ray-address {config.ray_address}", f"no Ray there ({error})") from None
    try:
        # After Ray's own handlers, which would end the process at once.
        with StopOnSignal() as stop:
            for attempt in range(config.max_failures + 1):
                status = _attempt(config, arguments, stop)
                if status == 0 or stop.requested:
                    return
                if status == _USER_ERROR:
                    raise SystemExit(status)
                sys.stderr.write(f"train: attempt {attempt + 1} failed with status {status}\n")
    finally:
        ray.shutdown()
    raise UserError("--max-failures", f"{config.max_failures + 1} attempts failed")


def _attempt(config: RayTrainConfig, arguments: list[str], stop: StopOnSignal) -> int:
    """Train once on `config.nodes` machines; 0, or the first status that was another."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{_TRAINER: 1}] * config.nodes, strategy="STRICT_SPREAD")
    try:
        while not ray.wait([group.ready()], timeout=_TICK_SEC)[0]:
            if stop.requested:
                return 0
        actors = [
            ray.remote(Machine)
            .options(
                num_cpus=0,
                resources={_TRAINER: 1},
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, number),
            )
            .remote()
            for number in range(config.nodes)
        ]
        return _train_on(actors, config.processes, arguments, stop)
    finally:
        remove_placement_group(group)


def _train_on(
    actors: Sequence[Any], processes: int, arguments: list[str], stop: StopOnSignal
) -> int:
    import ray
    from ray.exceptions import RayActorError

    try:
        master = ray.get(actors[0].address.remote())
    except RayActorError:
        return 1
    runs = [
        actor.train.remote(arguments, Nodes(len(actors), rank, master), processes)
        for rank, actor in enumerate(actors)
    ]
    waiting, first_failure, told = list(runs), 0, False
    while waiting:
        done, waiting = ray.wait(waiting, timeout=_TICK_SEC)
        for reference in done:
            try:
                first_failure = first_failure or ray.get(reference)
            except RayActorError:
                first_failure = first_failure or 1
        if (first_failure or stop.requested) and not told:
            told = True
            for actor in actors:
                actor.stop.remote()
    return first_failure


class Machine:
    """An actor that has a whole machine and runs torchrun there."""

    def __init__(self) -> None:
        # Ray hides the GPUs from an actor that asks for none; the machine is ours all the same.
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_stopping = False

    def address(self) -> str:
        """Where the other machines reach this one."""
        import ray.util

        address: str = ray.util.get_node_ip_address()
        return address

    def train(self, arguments: list[str], nodes: Nodes, processes: int) -> int:
        """Until torchrun has ended; its status."""
        command = trainer_command(arguments, num_processes=processes or num_devices(), nodes=nodes)
        self._process = subprocess.Popen(command, preexec_fn=_end_with_parent)
        if self._is_stopping:  # it was asked while torch was looking for GPUs
            self.stop()
        return self._process.wait()

    def stop(self) -> None:
        """The step in progress ends, and a checkpoint is written."""
        self._is_stopping = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)


def _end_with_parent() -> None:
    """An actor that is killed leaves no training behind, which would keep GPUs and port."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


if __name__ == "__main__":
    main()
