"""The bill of a training job before it is started: time, bytes, money.

Online (the encoders in every step) against offline (from stored latents and text) and ids (from
stored latents, the text encoder in every step), stage 1 and storage counted. GPU-hours are what is
computed; dollars are those times a price, which is an input.

A number stands alone, or for one resolution (256=740), or for so many GPUs together (256@8=5600):

python -m benchmarks plan --preset mosaicml-a100

python -m benchmarks plan --preset sd2-base --results benchmarks/results/*.json

python -m benchmarks plan --images 4e6 --resolutions 256,512 --epochs 5 --images-per-sec 256=740
512=165 --gpus 8 64 --usd-per-gpu-hour spot=2 on-demand=4
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.planner.business import business_case
from benchmarks.planner.config import PlanConfig
from benchmarks.planner.costs import (
    feed_rows,
    phase_rows,
    stage_one_rows,
    totals,
    training_rows,
)
from benchmarks.planner.job import Job, build_job
from benchmarks.planner.plot import check_plot, draw
from benchmarks.planner.presets import fill
from benchmarks.planner.stage_one import num_captions
from benchmarks.planner.stored_bytes import per_sample
from benchmarks.planner.table import print_plan
from benchmarks.result import result


def run(config: PlanConfig) -> None:
    """Plan, print, draw.

    Raises:
        UserError: an input that is missing, contradictory or impossible.
    """
    check_plot(config.plot)
    document = plan(config)
    print_plan(document)
    if config.plot:
        draw(document, config.plot)
        print(f"drawn in {config.plot}")
    if config.json:
        print(json.dumps(document, allow_nan=False))


def plan(config: PlanConfig) -> dict[str, Any]:
    """The whole plan as one document.

    Raises:
        UserError: an input that is missing, contradictory or impossible.
    """
    request = fill(config)
    job = build_job(request)
    sides = [phase.resolution for phase in job.phases]
    reference = job.config.gpus[0]
    found = totals(job, reference)
    _note_what_is_not_counted(job)
    return result(
        "plan",
        request.config,
        preset=config.preset or None,
        inputs=job.sources.inputs,
        usd_per_gpu_hour=dict(job.usd_per_gpu_hour),
        phases=phase_rows(job),
        training=training_rows(job),
        stage_one=stage_one_rows(job, reference),
        totals=found,
        bytes={
            **per_sample(job.config.unet, sides),
            "num_captions": num_captions(job.phases),
            "stored": {arm: found["arms"][arm]["stored_bytes"] for arm in ("offline", "ids")},
        },
        feed=feed_rows(job),
        business_case=business_case(job.config, found, job.usd_per_gpu_hour),
        notes=job.sources.notes,
    )


def _note_what_is_not_counted(job: Job) -> None:
    config, note = job.config, job.sources.note
    if not job.usd_per_gpu_hour:
        note("no dollars: no price is known (--usd-per-gpu-hour)")
    elif not config.storage_usd_per_tb_month:
        note("storage costs nothing here: no price is known (--storage-usd-per-tb-month)")
    if config.encode_usd_per_gpu_hour:
        note("GPU-hours of stage 1 are those of other GPUs; compare its dollars instead")
    if any(phase.epochs < 1 for phase in job.phases):
        note("less than an epoch is trained: only images that are seen are encoded and stored")
    note("every image has a caption of its own; shared captions are stored and encoded once")
    note("not counted: the ledger (URLs and metadata), checkpoints, source images, their download")
    note("not counted: restarts, validation, sample images, CPUs, network, people, failed attempts")
