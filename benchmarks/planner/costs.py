"""The arithmetic of the bill: hours, GPU-hours, dollars, break-even.

GPU-hours come first: prices change by the month and differ by the contract, work does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.planner.job import Job
from benchmarks.planner.phase import ARMS, Arm
from benchmarks.planner.stage_one import StageOne, num_captions
from benchmarks.planner.stored_bytes import TB, Text, latent_bytes, text_bytes

_HOURS_PER_MONTH = 365.25 * 24 / 12
_RUNS = (1, 2, 3, 10)

Json = dict[str, Any]


def train_hours(job: Job, num_gpus: int, arm: Arm = "offline") -> float:
    """Wall time of one training, all phases."""
    return sum(phase.hours(num_gpus, arm) for phase in job.phases)


def phase_rows(job: Job) -> Sequence[Json]:
    """What is trained."""
    return [
        {
            "resolution": phase.resolution,
            "num_images": phase.num_images,
            "num_encoded": phase.num_encoded,
            "images_seen": phase.images_seen,
            "epochs": phase.epochs,
            "factors": dict(phase.factors),
        }
        for phase in job.phases
    ]


def training_rows(job: Job) -> list[Json]:
    """One training from latents, for every number of GPUs: what published tables state."""
    rows = []
    for num_gpus in job.config.gpus:
        hours = train_hours(job, num_gpus)
        rows.append(
            {
                "num_gpus": num_gpus,
                "phases": [
                    {
                        "resolution": phase.resolution,
                        "images_per_sec": num_gpus * phase.offline.per_gpu(num_gpus),
                        "efficiency": phase.offline.share(num_gpus),
                        "is_known_count": phase.offline.is_known(num_gpus),
                        "is_assumed_efficiency": phase.offline.is_assumed(num_gpus),
                        "days": phase.hours(num_gpus) / 24,
                    }
                    for phase in job.phases
                ],
                "days": hours / 24,
                "gpu_hours": num_gpus * hours,
                "usd": _usd(num_gpus * hours, job.usd_per_gpu_hour),
            }
        )
    return rows


def stage_one_rows(job: Job, num_gpus: int) -> list[Json]:
    """Stage 1, in each way that there is; the first is counted with."""
    return [
        {
            "kind": option.source.kind,
            "source": option.source.words,
            "num_gpus": option.num_gpus or num_gpus,
            "gpu_hours": option.gpu_hours,
            "days": option.gpu_hours / (option.num_gpus or num_gpus) / 24,
            "usd": _usd(option.gpu_hours, _encode_prices(job, option)),
        }
        for option in job.stage_one
    ]


def arm_total(job: Job, arm: Arm, num_gpus: int, num_runs: int) -> Json:
    """All that so many trainings take in one way of training, with what it needs beforehand."""
    option = job.stage_one[0]
    encode = encode_gpu_hours(job, arm)
    training = num_runs * num_gpus * train_hours(job, num_gpus, arm)
    days = encode / (option.num_gpus or num_gpus) / 24 + training / num_gpus / 24
    stored = stored_bytes(job, arm)
    months = job.config.storage_months or days * 24 / _HOURS_PER_MONTH
    storage_usd = stored / TB * months * job.config.storage_usd_per_tb_month
    egress_usd = stored / TB * job.config.egress_usd_per_tb
    encode_usd = _usd(encode, _encode_prices(job, option))
    training_usd = _usd(training, job.usd_per_gpu_hour)
    return {
        "stage1_gpu_hours": encode,
        "training_gpu_hours": training,
        "gpu_hours": encode + training,
        "days": days,
        "stored_bytes": stored,
        "storage_months": months if stored else 0.0,
        "usd": {
            plan: {
                "stage1": encode_usd[plan],
                "training": training_usd[plan],
                "storage": storage_usd,
                "egress": egress_usd,
                "total": encode_usd[plan] + training_usd[plan] + storage_usd + egress_usd,
            }
            for plan in job.usd_per_gpu_hour
        },
    }


def totals(job: Job, num_gpus: int) -> Json:
    """The three ways of training side by side: for the planned runs, and the gain by runs."""
    arms = {arm: arm_total(job, arm, num_gpus, job.config.runs) for arm in ARMS}
    gains = {}
    for num_runs in _RUNS:
        hours = {arm: arm_total(job, arm, num_gpus, num_runs)["gpu_hours"] for arm in ARMS}
        gains[str(num_runs)] = {arm: hours["online"] / hours[arm] for arm in ARMS}
    cached: tuple[Arm, ...] = ("offline", "ids")
    break_even = {arm: _break_even(job, arm, num_gpus) for arm in cached}
    return {"num_gpus": num_gpus, "arms": arms, "gain": gains, "break_even": break_even}


def encode_gpu_hours(job: Job, arm: Arm) -> float:
    """GPU-hours of stage 1 that a way of training needs."""
    share = {"online": 0.0, "offline": 1.0, "ids": job.ids_frac}[arm]
    return share * job.stage_one[0].gpu_hours


def stored_bytes(job: Job, arm: Arm) -> float:
    """Bytes of the latent dataset, its ledger aside."""
    if arm == "online":
        return 0.0
    unet, text = job.config.unet, _text_of(job, arm)
    images = sum(
        phase.num_encoded * latent_bytes(job.config.latents, phase.resolution, unet)
        for phase in job.phases
    )
    return images + num_captions(job.phases) * text_bytes(text, unet)


def feed_rows(job: Job) -> list[Json]:
    """Bytes per second that training reads, by number of GPUs, phase and way of training."""
    config = job.config
    rows = []
    for num_gpus in config.gpus:
        per_node = min(num_gpus, config.gpus_per_node)
        for phase in job.phases:
            latents = latent_bytes(config.latents, phase.resolution, config.unet)
            row: Json = {"num_gpus": num_gpus, "resolution": phase.resolution}
            for arm in ("offline", "ids"):
                sample = latents + text_bytes(_text_of(job, arm), config.unet)
                rate = phase.offline.per_gpu(num_gpus) / phase.factors[arm] * sample / 1e6
                row[arm] = {
                    "mb_per_sec_per_gpu": rate,
                    "mb_per_sec_per_node": rate * per_node,
                    "mb_per_sec": rate * num_gpus,
                }
            rows.append(row)
    return rows


def _text_of(job: Job, arm: Arm) -> Text:
    return "ids" if arm == "ids" else job.config.text


def _break_even(job: Job, arm: Arm, num_gpus: int) -> Json:
    """From how much training on the cache is ahead of online: in runs, and in epochs of each phase.

    What comes before the first run is weighed against what each run saves; in dollars the cache is
    also kept for each run. None: never, a run saves nothing.
    """
    before, after = (arm_total(job, arm, num_gpus, num_runs) for num_runs in (0, 1))
    online = arm_total(job, "online", num_gpus, 1)
    saved = online["gpu_hours"] - (after["gpu_hours"] - before["gpu_hours"])
    runs = before["gpu_hours"] / saved if saved > 0 else None
    usd_runs = {}
    for plan in job.usd_per_gpu_hour:
        first, second, usd = (each["usd"][plan]["total"] for each in (before, after, online))
        saved = usd - (second - first)
        usd_runs[plan] = first / saved if saved > 0 else None
    epochs = {str(p.resolution): p.epochs * runs for p in job.phases} if runs is not None else None
    return {"runs": runs, "epochs": epochs, "usd_runs": usd_runs}


def _encode_prices(job: Job, option: StageOne) -> Mapping[str, float]:
    if option.usd_per_gpu_hour:
        return dict.fromkeys(job.usd_per_gpu_hour, option.usd_per_gpu_hour)
    return job.usd_per_gpu_hour


def _usd(gpu_hours: float, prices: Mapping[str, float]) -> dict[str, float]:
    return {plan: gpu_hours * price for plan, price in prices.items()}
