"""A device and its thread: takes batches from the queue until it is closed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from serve.batcher import Batcher
from serve.generator import AbandonedError, Generator, Picture
from serve.job import ImageTask, Job, ServedImage
from serve.metrics import ServeMetrics
from serve.refusal import RefusedError
from serve.speed import Speed

_log = logging.getLogger(__name__)


class Worker:
    """Generates what the queue hands out, on one device.

    Args:
        generator: of this device.
        batcher: shared by all devices.
        encoders: shared as well; make PNGs, so that the device need not wait for them.
        speed: shared as well; learns from each batch.
        metrics: the server's.
        check: raises where the device does not generate what it should.
    """

    def __init__(
        self,
        generator: Generator,
        batcher: Batcher,
        encoders: ThreadPoolExecutor,
        speed: Speed,
        metrics: ServeMetrics,
        check: Callable[[], None],
    ) -> None:
        self._generator, self._batcher, self._encoders = generator, batcher, encoders
        self._speed, self._metrics, self._check = speed, metrics, check
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._work_in_hand, self._began_at = 0.0, 0.0
        self._failed = False

    def start(self) -> None:
        """Begin to take batches."""
        self._thread.start()

    def join(self, timeout_sec: float) -> None:
        """Wait for the end of the batch in hand, once the queue is closed."""
        self._thread.join(timeout_sec)

    @property
    def is_healthy(self) -> bool:
        """Whether it takes batches, and passed its check if one has failed."""
        return self._thread.is_alive() and not self._failed

    @property
    def left_sec(self) -> float:
        """What the batch in hand is likely to take still."""
        expected_sec = self._speed.sec_for(self._work_in_hand)
        return max(0.0, expected_sec - (time.monotonic() - self._began_at))

    def _run(self) -> None:
        while batch := self._batcher.take():
            self._work_in_hand = sum(task.kind.work for task in batch)
            self._began_at = time.monotonic()
            for task in batch:
                task.job.start()
            try:
                self._serve(batch)
                self._failed = False
            except Exception as error:  # whatever it is, its requests get an answer
                _log.exception("a batch of %d images failed", len(batch))
                for task in batch:
                    task.job.fail(error)
                self._failed = not self._works()
            self._work_in_hand = 0.0

    def _works(self) -> bool:
        """Whether a batch failed for what was asked, and not for what is wrong with the device."""
        try:
            self._check()
        except Exception:  # it is logged, and `/ping` tells it
            _log.exception("the device fails its check as well")
            return False
        return True

    def _serve(self, batch: Sequence[ImageTask]) -> None:
        import torch

        began_at = time.monotonic()
        try:
            answers = self._generator.generate(batch)
        except AbandonedError:
            return
        except torch.OutOfMemoryError:
            answers = None  # what failed holds its tensors until here
        if answers is None:
            self._serve_halves(batch)
            return
        duration_sec = time.monotonic() - began_at
        self._speed.record(sum(task.kind.work for task in batch), duration_sec)
        self._metrics.observe_batch(len(batch), duration_sec)
        for task, answer in zip(batch, answers, strict=True):
            if isinstance(answer, RefusedError):
                task.job.fail(answer)
            else:
                encoding = self._encoders.submit(_deliver, task, answer, len(batch))
                encoding.add_done_callback(partial(_fail_with, task.job))

    def _serve_halves(self, batch: Sequence[ImageTask]) -> None:
        """A batch that the device has no memory for; a single image is refused."""
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) > 1:
            half = len(batch) // 2
            _log.warning("no memory for a batch of %d images: it is halved", len(batch))
            self._serve(batch[:half])
            self._serve(batch[half:])
            return
        message = f"the device has no memory for {batch[0].kind.width} x {batch[0].kind.height}"
        batch[0].job.fail(RefusedError(503, "out_of_memory", message, field="width"))


def _deliver(task: ImageTask, picture: Picture, batch_size: int) -> None:
    """Runs in one of the encoders' threads."""
    if not task.job.is_over:
        png = picture.to_png()
        image = ServedImage(png, picture.flagged, picture.warnings, batch_size)
        task.job.deliver(task.index, image)


def _fail_with(job: Job, encoding: Future[None]) -> None:
    if error := encoding.exception():
        job.fail(error)
