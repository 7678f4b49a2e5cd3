"""Agreeing on a stop among processes without waiting for the device."""

from __future__ import annotations

import torch
import torch.distributed


class StopVote:
    """A signal may reach one process alone; all must stop after the same step.

    Each step's vote is counted a step later, when the device has long been given the next one's
    work: the host looks at what is done, it never waits for what it has just asked for.

    Args:
        num_processes: alone, a process stops at once.
        device: where votes are added up.
    """

    def __init__(self, num_processes: int, device: torch.device) -> None:
        self._alone = num_processes == 1
        on_gpu = device.type == "cuda"
        self._votes = torch.zeros((), device=device)
        self._counted = torch.zeros((), pin_memory=on_gpu)
        self._arrival = torch.cuda.Event() if on_gpu else None

    def decide(self, requested: bool) -> bool:
        """Whether to stop after this step, the same on every process.

        Args:
            requested: whether this process was asked to stop.
        """
        if self._alone:
            return requested
        if self._arrival:
            self._arrival.synchronize()  # the vote of the step before
        stop = bool(self._counted > 0)
        self._votes.fill_(float(requested))
        torch.distributed.all_reduce(self._votes)
        self._counted.copy_(self._votes, non_blocking=True)
        if self._arrival:
            self._arrival.record()
        return stop
