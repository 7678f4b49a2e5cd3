"""A request on its way: what is asked for, the images that it falls into, and its one answer."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

# The n-th prompt gets seed + n, and every such seed can be asked for again. 2^53 is where the
# numbers of JavaScript, and so of many JSON parsers, stop being exact.
NUM_SEEDS = 1 << 53


@dataclass(frozen=True)
class Kind:
    """What images must share to be generated in one batch."""

    width: int
    height: int
    steps: int
    guidance: float
    scheduler: str

    @property
    def work(self) -> float:
        """Relative cost of an image: pixels that go through the U-Net."""
        evaluations = 2 if self.scheduler == "heun" else 1  # a second-order method, for each step
        branches = 2 if self.guidance > 1 else 1
        return float(self.width * self.height * self.steps * evaluations * branches)


@dataclass(frozen=True)
class ImageRequest:
    """A valid request: prompts, what they have in common, and the first one's seed."""

    prompts: tuple[str, ...]
    negative_prompt: str
    seed: int
    kind: Kind

    def seed_of(self, index: int) -> int:
        """Where the noise of one of the images starts."""
        return (self.seed + index) % NUM_SEEDS


@dataclass(frozen=True)
class ServedImage:
    """One image of an answer; `flagged` is None without a safety checker."""

    png: bytes
    flagged: bool | None
    warnings: tuple[str, ...]
    batch_size: int


@dataclass(eq=False)
class Job:
    """A request that was accepted. `future` has its images, in the order of the prompts.

    All methods may be called by any thread. The first end counts: images, an error, or that nobody
    waits any more.
    """

    request: ImageRequest
    future: Future[list[ServedImage]] = field(default_factory=Future)
    accepted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    ended_at: float | None = None

    def __post_init__(self) -> None:
        self._images: dict[int, ServedImage] = {}
        self._lock = threading.Lock()

    @property
    def tasks(self) -> list[ImageTask]:
        """Its images, each to be generated."""
        return [ImageTask(self, index) for index in range(len(self.request.prompts))]

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for an image of it."""
        return self.future.done()

    @property
    def queued_sec(self) -> float:
        """From its acceptance to the start of its first image, once it has started."""
        assert self.started_at is not None
        return self.started_at - self.accepted_at

    @property
    def generated_sec(self) -> float:
        """From the start of its first image to its end, once it has ended."""
        assert self.started_at is not None
        assert self.ended_at is not None
        return self.ended_at - self.started_at

    def start(self) -> None:
        """Its first image is being generated."""
        with self._lock:
            if self.started_at is None:
                self.started_at = time.monotonic()

    def deliver(self, index: int, image: ServedImage) -> None:
        """One image is there; with the last one the future is done."""
        with self._lock:
            self._images[index] = image
            if not self.is_over and len(self._images) == len(self.request.prompts):
                self.ended_at = time.monotonic()
                self.future.set_result([self._images[n] for n in range(len(self._images))])

    def fail(self, error: BaseException) -> None:
        """There will be no images."""
        with self._lock:
            if not self.is_over:
                self.ended_at = time.monotonic()
                self.future.set_exception(error)


@dataclass(frozen=True, eq=False)
class ImageTask:
    """One image of a job."""

    job: Job
    index: int

    @property
    def prompt(self) -> str:
        """What it is to show."""
        return self.job.request.prompts[self.index]

    @property
    def seed(self) -> int:
        """Where its noise starts."""
        return self.job.request.seed_of(self.index)

    @property
    def kind(self) -> Kind:
        """What the images of a batch share."""
        return self.job.request.kind
