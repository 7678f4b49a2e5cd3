"""Samplers by name, on the noise schedule that a U-Net was trained with."""

from __future__ import annotations

from typing import Any

from shards.errors import UserError

# The class of diffusers, and what it is told beside the schedule.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
DEFAULT_SCHEDULER = "dpm++"


def build_scheduler(name: str, schedule: Any) -> Any:
    """A new scheduler: they hold state, so each request and each pipeline has its own.

    Args:
        name: one of `SCHEDULERS`.
        schedule: configuration of any diffusers scheduler; gives betas and prediction type.

    Raises:
        UserError: no scheduler is called so.
    """
    if name not in SCHEDULERS:
        raise UserError("scheduler", f"{name!r}", wanted=f"one of {', '.join(SCHEDULERS)}")
    import diffusers

    kind, settings = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(schedule, **settings)
