"""The engine: a pipeline and a thread for each device behind one bounded queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from serve.batcher import Batcher
from serve.config import ServeConfig
from serve.generator import Generator, ModelFacts
from serve.job import ImageRequest, ImageTask, Job, Kind
from serve.metrics import ServeMetrics
from serve.refusal import RefusedError, draining
from serve.safety import load_checker
from serve.speed import Speed
from serve.worker import Worker
from shards.errors import UserError

LoadPipeline = Callable[[ServeConfig, str], Any]
_WARM_UP_STEPS = 3
_NUM_ENCODERS = 4  # threads that make PNGs: more than one device fills


def load_served_pipeline(config: ServeConfig, device: str) -> Any:
    """The pipeline that a configuration names, plain, in float32."""
    from evaluate.pipeline import load_pipeline

    return load_pipeline(config.source, config.model, weights=config.weights, device=device)


class Engine:
    """Takes requests from any thread, and answers each through its `Job`'s future.

    Args:
        config: of the server.
        load: builds the pipeline of a device; called as `load(config, device)`.
    """

    def __init__(self, config: ServeConfig, load: LoadPipeline = load_served_pipeline) -> None:
        self._config, self._load = config, load
        self._batcher = Batcher(
            config.max_queue, config.max_batch_size, config.batch_wait_ms / 1000
        )
        self._encoders = ThreadPoolExecutor(_NUM_ENCODERS, "png")
        self._speed = Speed()
        self.metrics = ServeMetrics(lambda: len(self._batcher), lambda: len(self._open_jobs))
        self._workers: list[Worker] = []
        self._open_jobs: set[Job] = set()
        self._changed = threading.Condition()
        self._is_draining = False
        self.devices: list[str] = []
        self.fast_path: list[str] = []
        self._facts: ModelFacts | None = None

    @property
    def facts(self) -> ModelFacts:
        """Of the model; known once it is loaded."""
        assert self._facts is not None, "the engine was not started"
        return self._facts

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._is_draining

    def start(self) -> None:
        """Load a pipeline for each device, generate with each, and take requests; once.

        Raises:
            UserError: the model cannot be loaded, its parts do not fit, or what it generates is not
                finite.
        """
        if self._workers:
            return
        self.devices = _devices_of(self._config.devices)
        generators = [self._build_generator(device) for device in self.devices]
        self._facts = generators[0].facts
        self._check_limits()
        for generator in generators:
            self._warm_up(generator)
        for generator in generators:
            worker = Worker(
                generator,
                self._batcher,
                self._encoders,
                self._speed,
                self.metrics,
                partial(self._warm_up, generator),
            )
            worker.start()
            self._workers.append(worker)

    def submit(self, request: ImageRequest) -> Job:
        """Queue a request.

        Raises:
            RefusedError: the queue has no room for its images, or the server is shutting down.
        """
        job = Job(request)
        with self._changed:
            if self._is_draining:
                raise draining()
            if not self._batcher.put(job):
                raise self._no_room(len(request.prompts))
            self._open_jobs.add(job)
        job.future.add_done_callback(lambda _: self._forget(job))
        return job

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken and every device works."""
        workers_are_well = bool(self._workers) and all(one.is_healthy for one in self._workers)
        return workers_are_well and not self._is_draining

    def start_draining(self) -> None:
        """Refuse new requests from now on; those that were accepted go on."""
        with self._changed:
            self._is_draining = True

    def drain(self, timeout_sec: float) -> bool:
        """Refuse new requests and wait for the end of those that were accepted.

        Returns:
            whether all of them ended in time; the others are told that the server shuts down.
        """
        self.start_draining()
        deadline = time.monotonic() + timeout_sec
        with self._changed:
            while self._open_jobs and (left_sec := deadline - time.monotonic()) > 0:
                self._changed.wait(left_sec)
            unfinished = list(self._open_jobs)
        for job in unfinished:
            job.fail(draining())
        return not unfinished

    def close(self) -> None:
        """End the threads; what is still open is told so."""
        self.drain(0)
        self._batcher.close()
        for worker in self._workers:
            worker.join(timeout_sec=30)
        self._encoders.shutdown()

    def _forget(self, job: Job) -> None:
        """A job is over: its places in the queue are free, if it still has any."""
        self._batcher.discard(job)
        with self._changed:
            self._open_jobs.discard(job)
            self._changed.notify_all()

    def _no_room(self, num_images: int) -> RefusedError:
        """When there is likely to be room: what must leave the queue first, and what is in hand."""
        queue_sec = self._speed.sec_for(self._batcher.work_ahead(num_images))
        in_hand_sec = min(worker.left_sec for worker in self._workers)
        message = f"{len(self._batcher)} images wait, and {num_images} more are too many"
        return RefusedError(
            429,
            "queue_full",
            message,
            retry_after_sec=in_hand_sec + queue_sec / len(self._workers),
        )

    def _build_generator(self, device: str) -> Generator:
        from serve.fast_path import apply_fast_path

        pipeline = self._load(self._config, device)
        self.fast_path = apply_fast_path(pipeline, self._config.fast, device)
        return Generator(pipeline, load_checker(self._config.safety_checker, device), device)

    def _check_limits(self) -> None:
        least, most = self._config.limits.sides_of(self.facts)
        sides = (self.facts.width, self.facts.height)
        if not all(least <= side <= most for side in sides):
            found, wanted = (
                f"{least} to {most}",
                f"{sides[0]} and {sides[1]} within, the model's own",
            )
            raise UserError("--min-side, --max-side", found, wanted=wanted)
        if self._config.limits.max_steps > self.facts.num_train_timesteps:
            raise UserError(
                "--max-steps",
                f"{self._config.limits.max_steps}",
                wanted=f"at most {self.facts.num_train_timesteps}, as the model was trained with",
            )

    def _warm_up(self, generator: Generator) -> None:
        """Twice: what is built at the first call is no part of the speed."""
        for _ in range(2):
            task = ImageTask(Job(self._warm_up_request()), 0)
            began_at = time.monotonic()
            try:
                answer = generator.generate([task])[0]
            except (RuntimeError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                found = f"does not generate ({reason})"
                raise UserError(self._config.source, found) from error
            duration_sec = time.monotonic() - began_at
            if isinstance(answer, RefusedError):
                raise UserError(self._config.source, answer.message, wanted="finite weights")
        self._speed.record(task.kind.work, duration_sec)

    def _warm_up_request(self) -> ImageRequest:
        defaults, facts = self._config.defaults, self.facts
        steps = min(_WARM_UP_STEPS, self._config.limits.max_steps)
        kind = Kind(facts.width, facts.height, steps, defaults.guidance, defaults.scheduler)
        return ImageRequest(("warm-up",), "", 0, kind)


def _devices_of(named: str) -> list[str]:
    import torch

    if named == "auto":
        return [f"cuda:{n}" for n in range(torch.cuda.device_count())] or ["cpu"]
    devices = [device.strip() for device in named.split(",")]
    for device in devices:
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:  # not a device, or none that is here
            reason = str(error).splitlines()[0]
            raise UserError(
                "--devices", f"{device!r} ({reason})", wanted="cuda:0, or cpu"
            ) from None
    return devices
