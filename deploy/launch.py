"""The command that starts train/main.py, in as many processes as there are GPUs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

TRAINER = Path(__file__).parent.parent / "train" / "main.py"
_MASTER_PORT = "29500"


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, as one of them sees them.

    Args:
        count: how many.
        rank: which of them this is.
        master: address of the first.
    """

    count: int = 1
    rank: int = 0
    master: str = "127.0.0.1"


def num_devices() -> int:
    """Processes for this machine: one for each GPU, or one without."""
    import torch

    return max(1, torch.cuda.device_count())


def trainer_command(
    arguments: list[str], *, num_processes: int, nodes: Nodes | None = None, max_restarts: int = 0
) -> list[str]:
    """The command that trains with these arguments; one process alone needs no torchrun.

    Args:
        arguments: of train/main.py.
        num_processes: on this machine.
        nodes: all machines; None: this one alone, or those that an operator has put into torchrun's
            PET_* variables.
        max_restarts: how often a failed run goes on from its last checkpoint, on one machine.
    """
    if nodes is None and "PET_NNODES" in os.environ:
        return [*_torchrun(), str(TRAINER), *arguments]
    nodes = nodes or Nodes()
    restarts = [f"--max-restarts={max_restarts}"] if max_restarts else []
    if num_processes * nodes.count == 1:
        return [sys.executable, str(TRAINER), *arguments, *restarts]
    place = [
        f"--nnodes={nodes.count}",
        f"--node-rank={nodes.rank}",
        f"--nproc-per-node={num_processes}",
        f"--master-addr={nodes.master}",
        f"--master-port={os.environ.get('MASTER_PORT', _MASTER_PORT)}",
    ]
    return [*_torchrun(), *place, *restarts, str(TRAINER), *arguments]


def _torchrun() -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run"]
