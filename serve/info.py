"""What the server says about itself."""

from __future__ import annotations

from importlib.metadata import version

from pydantic import BaseModel

from evaluate.schedulers import SCHEDULERS
from serve.config import ServeConfig
from serve.engine import Engine


class ServedDefaults(BaseModel):
    """What a request gets that does not say otherwise."""

    width: int
    height: int
    steps: int
    guidance: float
    scheduler: str


class ServedLimits(BaseModel):
    """What a request may ask for, and how many wait."""

    max_prompts: int
    max_prompt_chars: int
    max_tokens: int
    max_steps: int
    max_guidance: float
    min_side: int
    max_side: int
    side_multiple: int
    max_body_bytes: int
    max_queue: int
    max_batch_size: int
    timeout_sec: float


class ServerInfo(BaseModel):
    """The answer to `GET /v1/info`."""

    source: str
    weights: str
    version: str
    devices: list[str]
    fast_path: list[str]
    safety_checker: str | None
    schedulers: list[str]
    defaults: ServedDefaults
    limits: ServedLimits


def server_info(engine: Engine, config: ServeConfig) -> ServerInfo:
    """Of an engine that was started."""
    facts, limits, defaults = engine.facts, config.limits, config.defaults
    min_side, max_side = limits.sides_of(facts)
    return ServerInfo(
        source=config.source,
        weights=config.weights,
        version=version("latentmill"),
        devices=engine.devices,
        fast_path=engine.fast_path,
        safety_checker=config.safety_checker or None,
        schedulers=list(SCHEDULERS),
        defaults=ServedDefaults(
            width=facts.width,
            height=facts.height,
            steps=defaults.steps,
            guidance=defaults.guidance,
            scheduler=defaults.scheduler,
        ),
        limits=ServedLimits(
            max_prompts=limits.max_prompts,
            max_prompt_chars=limits.max_prompt_chars,
            max_tokens=facts.max_tokens,
            max_steps=limits.max_steps,
            max_guidance=limits.max_guidance,
            min_side=min_side,
            max_side=max_side,
            side_multiple=facts.size_multiple,
            max_body_bytes=limits.max_body_bytes,
            max_queue=config.max_queue,
            max_batch_size=config.max_batch_size,
            timeout_sec=config.timeout_sec,
        ),
    )
