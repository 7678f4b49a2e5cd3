"""Settings of the server."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from evaluate.schedulers import DEFAULT_SCHEDULER, SCHEDULERS
from serve.fast_path import FastPath
from shards.errors import UserError

if TYPE_CHECKING:
    from serve.generator import ModelFacts

TOKEN_VARIABLE = "LATENTMILL_TOKEN"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for; each is part of the server's OpenAPI document."""

    max_prompts: int = 8
    """Prompts, and so images, of one request."""
    max_prompt_chars: int = 4000
    """Characters of a prompt; what is over the tokenizer's limit is cut with a warning."""
    max_steps: int = 100
    """Denoising steps."""
    max_guidance: float = 20.0
    """Guidance scale; the least is 1, which is off."""
    max_side: int = 0
    """Pixels of a side; 0: twice the model's own size."""
    min_side: int = 0
    """Pixels of a side; 0: a quarter of the model's own size."""
    max_body_bytes: int = 1 << 20
    """Of a request's body."""

    def sides_of(self, facts: ModelFacts) -> tuple[int, int]:
        """Least and most pixels of a side, for a model."""
        least = self.min_side or min(facts.width, facts.height) // 4
        most = self.max_side or 2 * max(facts.width, facts.height)
        return max(least, facts.size_multiple), most


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a request gets that does not say otherwise; its size is the model's own."""

    steps: int = 25
    """Denoising steps."""
    guidance: float = 3.0
    """Guidance scale."""
    scheduler: str = DEFAULT_SCHEDULER
    """Sampler; see `evaluate/schedulers.py`."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of `python -m serve run`."""

    source: str
    """Run, checkpoint, exported folder, diffusers pipeline folder, or hub id."""
    model: str = ""
    """Model folder or hub id of VAE and text encoder; default: the one the run names."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Of a run; auto takes the averaged weights where there are any."""
    host: str = "127.0.0.1"
    """Address to listen on. One that others can reach wants a token or --allow-anonymous."""
    port: int = 8000
    """Port to listen on; 0: a free one."""
    token: Annotated[str, tyro.conf.arg(help_behavior_hint="(default: none)")] = field(
        default_factory=lambda: os.environ.get(TOKEN_VARIABLE, ""), repr=False
    )
    """Bearer token that requests must carry. Better in the environment, as LATENTMILL_TOKEN:
    arguments are seen by every user of the machine."""
    allow_anonymous: bool = False
    """Serve whoever reaches the address, without a token: behind a proxy that authenticates, or in
    a container whose port is published by its runtime."""
    devices: str = "auto"
    """Comma-separated, a pipeline each: cuda:0,cuda:1. auto: every GPU, else the CPU."""
    max_queue: int = 32
    """Images that may wait; more get 429 and the time after which to try again."""
    max_batch_size: int = 8
    """Images of one size, number of steps, guidance and scheduler that are generated together."""
    batch_wait_ms: float = 10.0
    """How long an image waits for others to be generated with it, when a device is idle."""
    timeout_sec: float = 120.0
    """A request that has no answer by then gets 504 and gives up its place."""
    drain_sec: float = 120.0
    """After SIGTERM: how long accepted requests may take to finish."""
    safety_checker: str = ""
    """module:factory, or a folder with a diffusers StableDiffusionSafetyChecker; default: none."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits()
    defaults: Annotated[Defaults, tyro.conf.arg(name="")] = Defaults()
    fast: FastPath = field(default_factory=FastPath)

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.defaults.scheduler not in SCHEDULERS:
            found, wanted = f"{self.defaults.scheduler!r}", f"one of {', '.join(SCHEDULERS)}"
            raise UserError("--scheduler", found, wanted=wanted)
        if not (self.is_loopback or self.token or self.allow_anonymous):
            raise UserError(
                "--host",
                f"{self.host} can be reached by others, and there is no token",
                remedy=f"set {TOKEN_VARIABLE}, or --allow-anonymous where others authenticate",
            )
        if not (self.token.isascii() and self.token.isprintable()):
            raise UserError("--token", "has characters outside ASCII", wanted="printable ASCII")
        if self.token != self.token.strip():  # a header loses them, and no request would match
            raise UserError("--token", "begins or ends with a space", wanted="none there")

    @property
    def is_loopback(self) -> bool:
        """Whether the address is reached from this machine alone."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def _check_numbers(self) -> None:
        limits, defaults = self.limits, self.defaults
        for name, value, least, most in (
            ("port", self.port, 0, 65535),
            ("max-batch-size", self.max_batch_size, 1, 4096),
            ("max-queue", self.max_queue, 1, 1 << 20),
            ("max-prompts", limits.max_prompts, 1, 1 << 20),
            ("max-prompt-chars", limits.max_prompt_chars, 1, 1 << 20),
            ("max-steps", limits.max_steps, 1, 1000),
            ("max-guidance", limits.max_guidance, 1, 1000),
            ("max-side", limits.max_side, 0, 1 << 16),
            ("min-side", limits.min_side, 0, 1 << 16),
            ("max-body-bytes", limits.max_body_bytes, 1, 1 << 30),
            ("steps", defaults.steps, 1, limits.max_steps),
            ("guidance", defaults.guidance, 1, limits.max_guidance),
            ("batch-wait-ms", self.batch_wait_ms, 0, 60_000),
            ("timeout-sec", self.timeout_sec, 0.001, 86_400),
            ("drain-sec", self.drain_sec, 0, 86_400),
        ):
            if not least <= value <= most:
                raise UserError(f"--{name}", f"{value}", wanted=f"{least} to {most}")
        if limits.max_prompts > self.max_queue:
            found = f"{limits.max_prompts}, and --max-queue is {self.max_queue}"
            raise UserError("--max-prompts", found, wanted="no more than the queue takes")
