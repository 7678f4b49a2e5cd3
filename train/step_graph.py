"""The whole training step as a CUDA graph: recorded once, replayed with one launch.

The method is that of torch's notes on CUDA graphs, "Whole-network capture". What differs between
steps is in tensors that stay in their place: inputs are copied to those of the recording; step
number and learning rate are the update's own. Draws are inputs too: they are a pure function of
seed and step, and a dozen launches.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from shards.errors import UserError

# Steps that run as they are before one is recorded: meanwhile compilers compile, cuDNN searches and
# the optimizer's tables are made.
WARM_UP_STEPS = 3

Outputs = tuple[Tensor, ...]


class Recorder(Protocol):
    """What a graph is recorded with."""

    def run(self, function: Callable[[], Outputs]) -> Outputs:
        """Run a function as it is to be recorded later."""
        ...

    def forget(self) -> None:
        """Give back what recordings hold; none of them is replayed again."""
        ...

    def record(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Record what a function does, without doing it.

        Returns:
            what does it, any number of times, and the tensors that then hold the outputs.
        """
        ...


class StepGraph:
    """Runs a function of tensors, and replays it once it has run a few times.

    Args:
        recorder: on a GPU a `CudaRecorder`.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._runs: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, Recording] = {}

    def run(
        self, variant: Hashable, function: Callable[..., Outputs], inputs: dict[str, Tensor]
    ) -> Outputs:
        """The function's outputs; those of a replay hold until the next one.

        Args:
            variant: of the function; another one is recorded apart.
            function: whatever it reads and writes beside its inputs must stay in place.
            inputs: of other shapes or types they are recorded apart as well: encoders that run
                along give float32 where shards hold float16.
        """
        key = (variant, *((tensor.shape, tensor.dtype) for tensor in inputs.values()))
        recording = self._recorded.get(key)
        if recording is None:
            self._runs[key] = self._runs.get(key, 0) + 1
            if self._runs[key] <= WARM_UP_STEPS:
                self._recorded.clear()  # a step as it is needs the memory that they hold
                self._recorder.forget()
                return self._recorder.run(lambda: function(**inputs))
            recording = Recording(self._recorder, function, inputs)
            self._recorded[key] = recording
        return recording.replay(inputs)


class Recording:
    """A function recorded, with tensors of its own for the inputs.

    Args:
        recorder: what records.
        function: of tensors by name; whatever else it reads and writes must stay in place.
        inputs: of the shapes and types that every replay will have.
    """

    def __init__(
        self, recorder: Recorder, function: Callable[..., Outputs], inputs: dict[str, Tensor]
    ) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._replay, self._outputs = recorder.record(lambda: function(**self._inputs))

    def replay(self, inputs: dict[str, Tensor]) -> Outputs:
        """The outputs for these inputs; they hold until the next replay."""
        for name, own in self._inputs.items():
            own.copy_(inputs[name], non_blocking=True)
        self._replay()
        return self._outputs


class CudaRecorder:
    """Records on a stream of its own; all recordings share their memory.

    They may, because they are replayed one after another, and what outlives a replay is either an
    output, which is never given back, or lies outside.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[Any] = []  # a graph lives as long as it is replayed

    def run(self, function: Callable[[], Outputs]) -> Outputs:
        """On the recording's stream: autograd remembers the stream of a weight's first use."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = function()
        current.wait_stream(self._stream)
        for output in outputs:
            output.record_stream(current)
        return outputs

    def forget(self) -> None:
        """Memory comes back with the last graph; the next ones need a pool of their own."""
        if self._graphs:
            self._graphs.clear()
            self._pool = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()

    def record(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """Other threads may use the device meanwhile: the reader pins memory.

        Raises:
            UserError: something in the step cannot be recorded here.
        """
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        current = torch.cuda.current_stream()
        gc.collect()  # what is in a cycle holds memory that the recording may need
        try:
            with recording:
                outputs = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause: BaseException = error
            if isinstance(error.__context__, RuntimeError):  # this one is of ending the recording
                cause = error.__context__
                self._abandon(current)
            reason = str(cause).partition("\n")[0]
            raise UserError("--cuda-graph", reason, remedy="--cuda-graph off") from error
        self._graphs.append(graph)
        return graph.replay, outputs

    def _abandon(self, current: torch.cuda.Stream) -> None:
        """Put right what torch leaves as it is where a recording cannot even be ended."""
        torch.cuda.set_stream(current)
        torch._C._cuda_endAllocateToPool(current.device_index, self._pool)
        torch._C._cuda_releasePool(current.device_index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
