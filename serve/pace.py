"""The host stays near the device, so that a batch can be stopped."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

_MOST_AHEAD = 2  # steps: enough for the device never to wait for the host


class Pace:
    """Lets the host hand out at most two denoising steps before the device has ended them.

    With recorded steps the host would otherwise be through with an image when the device has hardly
    begun, and nothing would be left to stop when its client goes.

    Args:
        record: marks where the device's work now stands; returns what can be waited for.
    """

    def __init__(self, record: Callable[[], Any]) -> None:
        self._record = record
        self._marks: deque[Any] = deque()

    def step(self) -> None:
        """To be called once the work of a step is handed out."""
        self._marks.append(self._record())
        if len(self._marks) > _MOST_AHEAD:
            self._marks.popleft().synchronize()


def pace_of(device: str) -> Pace | None:
    """For a GPU; a CPU has ended a step when the call returns."""
    import torch

    if torch.device(device).type != "cuda":
        return None

    def record() -> Any:
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return Pace(record)
