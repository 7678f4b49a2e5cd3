"""Where the time of a training step goes: kernels by kind, the longest ones, and idle gaps.

From the profiler's trace. On a GPU the kernels are what counts, also those of a CUDA graph; on a
CPU the operators are, each without those that it calls.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.train_step.kernel_kinds import kind_of
from shards.column import Json

NUM_STEPS = 3
NUM_TOP = 25
_NUM_GAPS = 5
_MIN_GAP_US = 5.0
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = ("Launch", "cudaMemcpyAsync", "cudaMemsetAsync")


@dataclass(frozen=True)
class Span:
    """One kernel, or one operator without those that it calls.

    Args:
        name: as the profiler has it.
        start_us: on the trace's clock.
        duration_us: of an operator, its own.
    """

    name: str
    start_us: float
    duration_us: float

    @property
    def end_us(self) -> float:
        """On the trace's clock."""
        return self.start_us + self.duration_us


def profile_steps(run: Callable[[int], object], num_steps: int, device: str, trace: Path) -> Json:
    """Run some steps under the profiler.

    Args:
        run: so many steps; at its end the host waits for the device. It is warm.
        num_steps: to run.
        device: cuda or cpu.
        trace: file for the trace.

    Returns:
        see `summarise`.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        run(num_steps)
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return summarise(events, num_steps, device)


def summarise(events: Iterable[dict[str, Any]], num_steps: int, device: str) -> Json:
    """What a trace says.

    Args:
        events: `traceEvents` of a Chrome trace; times in microseconds.
        num_steps: in the trace.
        device: cuda or cpu.

    Returns:
        time by `kinds` and of the `top` kernels; on a GPU also `timeline`, see `find_gaps`, and
        `launches_per_step` by the name of the call.

    Raises:
        RuntimeError: nothing ran on the device, or the profiler may not see it.
    """
    events = [event for event in events if event.get("ph") == "X"]
    if device == "cuda":
        spans = [_span(event) for event in events if event.get("cat") in _ON_DEVICE]
    else:
        spans = own_times([event for event in events if event.get("cat") == "cpu_op"])
    if not spans:
        raise RuntimeError(f"the profiler saw nothing that ran on {device}")
    document: Json = {"device": device, "num_steps": num_steps, **tally(spans, num_steps)}
    if device == "cuda":
        document["timeline"] = find_gaps(spans)
        document["launches_per_step"] = _launches(events, num_steps)
    return document


def tally(spans: list[Span], num_steps: int) -> Json:
    """Time by kind, and the names with the most of it."""
    total_us = sum(span.duration_us for span in spans)
    by_name: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        by_name[span.name].append(span.duration_us)
    rows: list[Json] = [
        {
            "name": name,
            "kind": kind_of(name),
            "count_per_step": len(durations) / num_steps,
            "ms_per_step": sum(durations) / num_steps / 1000,
            "mean_us": sum(durations) / len(durations),
            "share_frac": sum(durations) / total_us if total_us else 0.0,
        }
        for name, durations in by_name.items()
    ]
    rows.sort(key=lambda row: row["ms_per_step"], reverse=True)
    kinds: dict[str, Json] = {}
    for row in rows:
        kind = kinds.setdefault(row["kind"], dict.fromkeys(_SUMMED, 0.0))
        for name in _SUMMED:
            kind[name] += row[name]
    ordered = sorted(kinds.items(), key=lambda item: item[1]["ms_per_step"], reverse=True)
    return {
        "ms_per_step": total_us / num_steps / 1000,
        "kinds": [{"kind": kind, **figures} for kind, figures in ordered],
        "top": rows[:NUM_TOP],
    }


_SUMMED = ("count_per_step", "ms_per_step", "share_frac")


def find_gaps(spans: list[Span]) -> Json:
    """When the device had nothing to do, between its first kernel and the end of its last.

    Kernels may overlap; the device is busy while any of them runs.

    Returns:
        `span_ms`, `busy_frac`, the gaps of more than 5 us by number and sum, and the `largest`.
    """
    ordered = sorted(spans, key=lambda span: span.start_us)
    last, idle_us = ordered[0], 0.0
    gaps: list[Json] = []
    for _, span in pairwise(ordered):
        gap_us = span.start_us - last.end_us
        if gap_us > 0:
            idle_us += gap_us
        if gap_us > _MIN_GAP_US:
            gaps.append({"us": gap_us, "after": last.name, "before": span.name})
        if span.end_us > last.end_us:
            last = span
    span_us = last.end_us - ordered[0].start_us
    gaps.sort(key=lambda gap: gap["us"], reverse=True)
    return {
        "span_ms": span_us / 1000,
        "busy_frac": 1 - idle_us / span_us,
        "num_gaps": len(gaps),
        "gaps_ms": sum(gap["us"] for gap in gaps) / 1000,
        "largest": gaps[:_NUM_GAPS],
    }


def own_times(events: list[dict[str, Any]]) -> list[Span]:
    """Operators, each with its time less that of the operators it calls.

    Args:
        events: complete events of one category, nested by time in each thread.
    """
    spans: list[Span] = []
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event.get("tid")].append(event)
    for calls in threads.values():
        calls.sort(key=lambda event: (float(event["ts"]), -float(event["dur"])))
        own = [float(event["dur"]) for event in calls]
        open_calls: list[int] = []
        for number, event in enumerate(calls):
            while open_calls and _end(calls[open_calls[-1]]) <= float(event["ts"]):
                open_calls.pop()
            if open_calls:
                own[open_calls[-1]] -= float(event["dur"])
            open_calls.append(number)
        spans += [
            Span(event["name"], float(event["ts"]), max(own_us, 0.0))
            for event, own_us in zip(calls, own, strict=True)
        ]
    return spans


def _launches(events: Iterable[dict[str, Any]], num_steps: int) -> dict[str, float]:
    """Calls of the runtime and the driver that put work on the device, per step."""
    counts: dict[str, float] = defaultdict(float)
    for event in events:
        of_cuda = event.get("cat") in ("cuda_runtime", "cuda_driver")
        if of_cuda and any(word in event["name"] for word in _LAUNCHES):
            counts[event["name"]] += 1 / num_steps
    return dict(counts)


def _span(event: dict[str, Any]) -> Span:
    return Span(event["name"], float(event["ts"]), float(event["dur"]))


def _end(event: dict[str, Any]) -> float:
    return float(event["ts"]) + float(event["dur"])
