"""What the server counts and times, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class ServeMetrics:
    """Counters and histograms in a registry of their own, so that servers do not share them.

    Args:
        count_queued: images that wait, asked for at each scrape.
        count_open: requests that were accepted and are not answered yet, likewise.
    """

    def __init__(self, count_queued: Callable[[], int], count_open: Callable[[], int]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "latentmill_requests",
            "Requests answered; status 499 is a client that left before its answer.",
            ("route", "status"),
            registry=registry,
        )
        self._images = Counter("latentmill_images", "Images generated.", registry=registry)
        self._cancelled = Counter(
            "latentmill_requests_cancelled", "Clients that left.", registry=registry
        )
        self._timed_out = Counter(
            "latentmill_requests_timed_out", "Requests that got 504.", registry=registry
        )
        queued = Gauge("latentmill_queued_images", "Images that wait.", registry=registry)
        queued.set_function(count_queued)
        open_requests = Gauge(
            "latentmill_open_requests", "Accepted and not answered yet.", registry=registry
        )
        open_requests.set_function(count_open)
        self._batch_size = Histogram(
            "latentmill_batch_size", "Images of a batch.", registry=registry, buckets=_BATCH_SIZES
        )
        self._batch_sec = Histogram(
            "latentmill_batch_seconds", "A batch's duration.", registry=registry, buckets=_SECONDS
        )
        self._queued_sec = Histogram(
            "latentmill_queued_seconds",
            "From a request's acceptance to the start of its first image.",
            registry=registry,
            buckets=_SECONDS,
        )
        self._generated_sec = Histogram(
            "latentmill_generated_seconds",
            "From the start of a request's first image to the end of its last.",
            registry=registry,
            buckets=_SECONDS,
        )

    def count_request(self, route: str, status: int) -> None:
        """A request was answered."""
        self._requests.labels(route, str(status)).inc()

    def count_cancelled(self) -> None:
        """A client left before its answer."""
        self._cancelled.inc()

    def count_timed_out(self) -> None:
        """A request took too long."""
        self._timed_out.inc()

    def observe_batch(self, num_images: int, duration_sec: float) -> None:
        """A batch was generated."""
        self._images.inc(num_images)
        self._batch_size.observe(num_images)
        self._batch_sec.observe(duration_sec)

    def observe_answer(self, queued_sec: float, generated_sec: float) -> None:
        """A request got its images."""
        self._queued_sec.observe(queued_sec)
        self._generated_sec.observe(generated_sec)

    def exposition(self) -> bytes:
        """All of it, in Prometheus' text format."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)
