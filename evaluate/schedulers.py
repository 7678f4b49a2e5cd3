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
# What they cannot sample: classes that do not know a prediction raise in mid-image; those without
# a rescaled schedule pass over it, and leave noise in the image or end in NaN.
_CANNOT = {
    "flow_prediction": {"ddim", "ddpm", "euler", "euler-a", "heun", "pndm"},
    "sample": {"euler-a", "pndm"},
    "zero terminal SNR": {"heun", "pndm"},
}


def build_scheduler(name: str, schedule: Any) -> Any:
    """A new scheduler: they hold state, so each request and each pipeline has its own.

    Args:
        name: one of `SCHEDULERS`.
        schedule: configuration of any diffusers scheduler; gives betas and prediction type.

    Raises:
        UserError: no scheduler is called so, or it cannot sample this schedule.
    """
    if name not in SCHEDULERS:
        raise UserError("scheduler", f"{name!r}", wanted=f"one of {', '.join(SCHEDULERS)}")
    kinds = [schedule.get("prediction_type", "epsilon")]
    kinds += ["zero terminal SNR"] if schedule.get("rescale_betas_zero_snr") else []
    for what in kinds:
        if name in (unable := _CANNOT.get(what, set())):
            able = ", ".join(other for other in SCHEDULERS if other not in unable)
            found = f"{name} cannot sample a U-Net trained for {what}"
            raise UserError("scheduler", found, wanted=f"one of {able}")
    import diffusers

    kind, settings = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(schedule, **settings)
