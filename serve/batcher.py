"""The bounded queue of images, handed out in batches of a kind."""

from __future__ import annotations

import threading
import time

from serve.job import ImageTask, Job


class Batcher:
    """Images wait here for a device; the oldest decides which kind is next, so that none starves.

    Args:
        capacity: images that may wait.
        max_batch_size: images of one batch.
        wait_sec: how long the oldest waits for others of its kind to fill a batch.
    """

    def __init__(self, capacity: int, max_batch_size: int, wait_sec: float) -> None:
        self._capacity, self._max_batch_size = capacity, max_batch_size
        self._wait_sec = wait_sec
        self._tasks: list[ImageTask] = []
        self._is_closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Images that wait."""
        return len(self._tasks)

    def put(self, job: Job) -> bool:
        """Queue all images of a job, or none of them, where there are too few places."""
        tasks = job.tasks
        with self._changed:
            if self._is_closed or len(self._tasks) + len(tasks) > self._capacity:
                return False
            self._tasks += tasks
            self._changed.notify_all()
        return True

    def discard(self, job: Job) -> None:
        """Free the places of a job that is over."""
        with self._changed:
            self._tasks = [task for task in self._tasks if task.job is not job]
            self._changed.notify_all()

    def take(self) -> list[ImageTask]:
        """Wait for the next batch; an empty one once the queue is closed."""
        with self._changed:
            while not self._is_closed:
                batch = self._next()
                if not batch:
                    self._changed.wait()
                    continue
                left_sec = batch[0].job.accepted_at + self._wait_sec - time.monotonic()
                if len(batch) == self._max_batch_size or left_sec <= 0:
                    taken = set(batch)
                    self._tasks = [task for task in self._tasks if task not in taken]
                    return batch
                self._changed.wait(left_sec)
        return []

    def close(self) -> None:
        """Hand out nothing more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def work_ahead(self, num_images: int) -> float:
        """Work that must leave the queue before so many images find places."""
        with self._changed:
            num_leaving = len(self._tasks) + num_images - self._capacity
            return sum(task.kind.work for task in self._tasks[: max(0, num_leaving)])

    def _next(self) -> list[ImageTask]:
        """The oldest image and those like it."""
        kind = self._tasks[0].kind if self._tasks else None
        return [task for task in self._tasks if task.kind == kind][: self._max_batch_size]
