"""Recordings of what a pipeline's parts do, one for each shape, the least used given up first.

A request may have any size, number of steps and batch, after any other. What is recorded is a
function of tensors whose shapes and types are its key, so that nothing is ever replayed for another
shape than its own. The method is that of torch's notes on CUDA graphs.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from shards.errors import UserError
from train.step_graph import CudaRecorder, Outputs, Recorder, Recording

# Runs of a shape as they are, before it is recorded: meanwhile compilers compile, cuDNN searches
# and libraries take their workspace.
WARM_UP_RUNS = 2

# Of one image: text encoder, U-Net, VAE. None of them is given up while the device still runs it.
MIN_GRAPHS = 3

# Other devices' threads may go on, but a recording begins by giving back memory of all devices.
_one_at_a_time = threading.Lock()

_log = logging.getLogger(__name__)


class InferenceRecorder(CudaRecorder):
    """Recordings come and go: all but the last live only as long as something can replay them.

    All share their memory, also with those that are gone. So what is taken is that of the largest,
    and an output holds only until something else is replayed.
    """

    def record(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """See `CudaRecorder.record`."""
        with _one_at_a_time:
            recorded = super().record(function)
        del self._graphs[:-1]  # `forget` needs to know that there are any
        return recorded


@dataclass
class _Entry:
    """Of one key: how often it ran as it is, and then its recording."""

    num_runs: int = 0
    recording: Recording | None = None
    is_recordable: bool = True


class GraphCache:
    """Runs functions of tensors, and replays those that have run a few times.

    Args:
        recorder: on a GPU an `InferenceRecorder`.
        max_graphs: recordings at a time; at least `MIN_GRAPHS`.

    Attributes:
        num_recorded: since the start.
        refusals: why functions could not be recorded, by name.
    """

    def __init__(self, recorder: Recorder, max_graphs: int) -> None:
        assert max_graphs >= MIN_GRAPHS
        self._recorder, self._max_graphs = recorder, max_graphs
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self.num_recorded = 0
        self.refusals: dict[str, str] = {}

    def __len__(self) -> int:
        return sum(entry.recording is not None for entry in self._entries.values())

    def run(
        self, name: str, function: Callable[..., Outputs], inputs: dict[str, Tensor]
    ) -> Outputs:
        """The function's outputs; they hold until the next call.

        Args:
            name: of the function; what else it reads must stay in place.
            inputs: of the function, by the names of its arguments.

        Raises:
            torch.OutOfMemoryError: also without recordings.
        """
        key = (name, *((tensor.shape, tensor.dtype) for tensor in inputs.values()))
        entry = self._entry(key)
        if entry.recording is None and entry.is_recordable and entry.num_runs >= WARM_UP_RUNS:
            self._record(entry, name, function, inputs)
        if entry.recording is not None:
            return entry.recording.replay(inputs)
        entry.num_runs += 1
        try:
            return self._recorder.run(lambda: function(**inputs))
        except torch.OutOfMemoryError:
            if not len(self):
                raise
        self.clear()  # outside of the handler, which holds what ran out of memory
        return self._recorder.run(lambda: function(**inputs))

    def clear(self) -> None:
        """Give back what recordings hold."""
        self._entries.clear()
        self._recorder.forget()

    def _entry(self, key: Hashable) -> _Entry:
        entry = self._entries.setdefault(key, _Entry())
        self._entries.move_to_end(key)
        if len(self._entries) > self._max_graphs:
            self._entries.popitem(last=False)
        return entry

    def _record(
        self,
        entry: _Entry,
        name: str,
        function: Callable[..., Outputs],
        inputs: dict[str, Tensor],
    ) -> None:
        try:
            entry.recording = Recording(self._recorder, function, inputs)
            self.num_recorded += 1
            return
        except torch.OutOfMemoryError:
            _log.warning("no memory to record the %s: recordings are given up", name)
        except UserError as error:
            entry.is_recordable = False
            self.refusals[name] = str(error)
            _log.warning("the %s runs without being recorded: %s", name, error)
            return
        self.clear()
