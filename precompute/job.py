"""A whole job: which shards lack which columns, encode those, account for everything."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from precompute.account import print_account
from precompute.columns import image_columns, text_columns
from precompute.compile_choice import is_compiled
from precompute.config import PrecomputeConfig
from precompute.engine import Events, Failed, Finished, Progressed, WorkerDied
from precompute.filters import Filter
from precompute.job_account import JobAccount
from precompute.model_folder import find_model
from precompute.plan import null_is_there, plan_tasks
from precompute.progress import Progress
from precompute.shard_task import ShardTask
from precompute.worker_spec import WorkerSpec, default_decode_workers
from shards.column import ColumnSpec, Json
from shards.errors import UnreadableShardError, UserError
from shards.find_shards import find_shards
from shards.garbage import remove_leftovers
from shards.manifest import write_manifest
from shards.stop import StopOnSignal
from shards.storage import Location, location, writing_job

# dataset.json follows the job at this pace, for training that begins before it ends; building it
# must not take more than a small share of the time.
_MANIFEST_SEC, _MANIFEST_SHARE = 10.0, 0.02


def precompute(config: PrecomputeConfig, stop: StopOnSignal | None = None) -> Json:
    """Run a job to its end, or until it is asked to stop, and return the manifest.

    Raises:
        UserError: the command cannot be carried out; what was written before stays good.
    """
    resolutions = config.parsed_resolutions()
    sources, gaps = find_shards(config.shards)
    if gaps:
        print(f"{len(gaps)} shards of the pattern do not exist: {gaps[0]}, … (gaps are fine)")
    model = find_model(config.model)
    devices = _choose_devices(config)
    compiled = is_compiled(config, devices, sources)
    sources = config.in_range(sources)
    dtype = _choose_dtype(config, devices)
    columns: list[ColumnSpec] = []
    if resolutions:
        options = {"bucket_step": config.bucket_step, "flip": config.flip}
        columns += image_columns(model, resolutions, dtype, config.latents, **options)  # type: ignore[arg-type]
    columns += text_columns(model, dtype, config.text)
    dataset = location(config.out)
    decode_workers = config.decode_workers or default_decode_workers(len(devices))
    account = JobAccount(len(devices), decode_workers)
    job = _Job(dataset, stop or StopOnSignal(), account)
    with writing_job(dataset, shared=bool(config.shard_range)):
        remove_leftovers(dataset)
        tasks = plan_tasks(dataset, sources, columns, config)
        if tasks or not null_is_there(dataset, columns):
            print(
                f"{dataset}: {len(tasks):,} of {len(sources):,} shards to encode, "
                f"model {model.name}, {dtype}{', compiled' if compiled else ''}"
            )
            spec = WorkerSpec(
                dataset=config.out,
                model=model,
                columns=columns,
                device=devices[0],
                dtype=dtype,
                wanted=Filter(config.filter).expression,
                caption_field=config.caption_field,
                batch_size=config.batch_size,
                decode_workers=decode_workers,
                compiled=compiled,
            )
            job.follow(_start(config, spec, devices, tasks), tasks)
        else:
            print(f"{dataset}: all {len(sources):,} shards are there already, nothing to do")
        manifest = write_manifest(dataset)
    print_account(dataset, manifest, columns, len(job.failed))
    job.report(config.shards, len(sources))
    return manifest


def _choose_devices(config: PrecomputeConfig) -> list[str]:
    """One for each worker of this machine; a Ray cluster has devices of its own."""
    if config.engine == "ray" and config.ray_address:
        if config.device == "auto":
            wanted = "cuda or cpu: what the cluster's machines have cannot be seen from here"
            raise UserError("--device", "auto, with --ray-address", wanted=wanted)
        if not config.workers:
            wanted = "how many actors, such as the number of the cluster's GPUs"
            raise UserError("--workers", "not given, with --ray-address", wanted=wanted)
    if config.device == "cpu" or (config.engine == "ray" and config.device != "auto"):
        return [config.device] * max(1, config.workers)
    from precompute.loading import find_devices

    devices = find_devices(config.device)
    num_workers = config.workers or len(devices)
    return [devices[number % len(devices)] for number in range(num_workers)]


def _choose_dtype(config: PrecomputeConfig, devices: Sequence[str]) -> str:
    if config.dtype in ("float32", "float16", "bfloat16"):
        return config.dtype
    if config.dtype != "auto":
        raise UserError("--dtype", config.dtype, wanted="one of auto, float32, float16, bfloat16")
    return "float16" if devices[0].startswith("cuda") else "float32"


def _start(
    config: PrecomputeConfig, spec: WorkerSpec, devices: list[str], tasks: list[ShardTask]
) -> Events:
    """Hand the tasks to an engine."""
    if config.engine == "ray" and tasks:
        from precompute.ray_cluster import run_ray

        return run_ray(spec, tasks, len(devices), config.ray_address)
    from precompute.local_engine import run_here, run_local

    if len(devices) == 1 or len(tasks) <= 1:
        return run_here(spec, tasks)
    return run_local([replace(spec, device=device) for device in devices], tasks)


@dataclass
class _Job:
    """What became of a job's shards."""

    dataset: Location
    stop: StopOnSignal
    account: JobAccount
    finished: int = 0
    failed: list[UnreadableShardError] = field(default_factory=list)

    def follow(self, events: Events, tasks: list[ShardTask]) -> None:
        """See an engine through to its end, or to ours."""
        progress = Progress([task.source for task in tasks])
        self._last_manifest, self._manifest_cost = 0.0, 0.0
        try:
            for event in events:
                self._take(event, progress)
                if self.stop.requested:
                    break
        finally:
            events.close()  # type: ignore[attr-defined]  # a generator: ends its workers
            progress.close()
        self.account.finish()
        if self.finished:
            print(self.account.summary(progress.num_samples))

    def _take(self, event: object, progress: Progress) -> None:
        match event:
            case Progressed(num_samples=num_samples):
                progress.count(num_samples)
            case Finished(task=task, done=done):
                self.finished += 1
                self.account.add(done.seconds)
                progress.finish_shard(task.source)
                self._update_manifest()
            case Failed(error=error):
                self.failed.append(error)
                progress.say(f"precompute: {error}")
            case WorkerDied(why=why, num_shards=num_shards):
                progress.say(
                    f"precompute: a worker died: {why}; {num_shards} shards are handed out again"
                )

    def _update_manifest(self) -> None:
        """Bring dataset.json up to date now and then."""
        pause = max(_MANIFEST_SEC, self._manifest_cost / _MANIFEST_SHARE)
        start = time.monotonic()
        if self._last_manifest and start - self._last_manifest < pause:
            return
        write_manifest(self.dataset)
        self._last_manifest = time.monotonic()
        self._manifest_cost = self._last_manifest - start

    def report(self, patterns: str, num_sources: int) -> None:
        """Say how it ended.

        Raises:
            UnreadableShardError: shards could not be read.
        """
        if self.stop.requested:
            print(
                "precompute: stopped as asked; what is written is whole. The same command again "
                "does the rest",
                file=sys.stderr,
            )
        if self.failed:
            raise UnreadableShardError(
                patterns,
                f"{len(self.failed)} of {num_sources} shards unread; {self.failed[0]}",
            )
