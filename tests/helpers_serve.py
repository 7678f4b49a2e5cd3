"""Servers for tests, with a pipeline that a test can hold or with a real one of random weights."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from conftest import REPOSITORY, TINY_MODEL
from fastapi.testclient import TestClient
from PIL import Image

from serve.app import build_app
from serve.config import ServeConfig
from serve.engine import Engine
from serve.job import ImageRequest, Kind, ServedImage

SIDE = 64
WAIT_SEC = 20.0


class HeldPipeline:
    """What the server uses of a diffusers pipeline; an image is one colour, made from its seed.

    Each denoising step waits for `steps`, a semaphore, unless the pipeline is `free`.
    """

    vae_scale_factor = 8

    def __init__(self) -> None:
        from diffusers import DDPMScheduler

        self.scheduler = DDPMScheduler()
        self.unet = SimpleNamespace(config=SimpleNamespace(sample_size=SIDE // 8))
        self.text_encoder = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=7))
        self.tokenizer = WordTokenizer()
        self.steps = threading.Semaphore(0)
        self.free = True
        self.batches: list[list[str]] = []
        self.num_steps_done = 0
        self.failing: Callable[[list[str]], BaseException | None] = lambda prompts: None

    def __call__(self, prompts: list[str], **given: Any) -> Any:
        import torch

        if error := self.failing(prompts):
            raise error
        self.batches.append(prompts)
        for step in range(given["num_inference_steps"]):
            if not self.free:
                assert self.steps.acquire(timeout=WAIT_SEC), "the test holds the pipeline for ever"
            self.num_steps_done += 1
            given["callback_on_step_end"](self, step, 0, {})
        images = torch.stack(
            [
                torch.rand(3, 1, 1, generator=generator).expand(3, given["height"], given["width"])
                for generator in given["generator"]
            ]
        ).clone()
        for row, prompt in enumerate(prompts):
            if prompt == "not finite":
                images[row, 0, 0, 0] = torch.nan
        return SimpleNamespace(images=images)


class WordTokenizer:
    """A token for each word, one before and one after."""

    model_max_length = 7

    def __call__(self, text: str, *, truncation: bool) -> Any:
        assert not truncation
        self._words = text.split()
        return SimpleNamespace(input_ids=list(range(len(self._words) + 2)))

    def decode(self, input_ids: list[int]) -> str:
        return " ".join(self._words[number - 1] for number in input_ids)


def build_config(**settings: Any) -> ServeConfig:
    return ServeConfig(**({"source": "memory", "devices": "cpu", "batch_wait_ms": 0} | settings))


@contextmanager
def held_engine(**settings: Any) -> Iterator[tuple[Engine, HeldPipeline]]:
    """An engine around a `HeldPipeline`, which is free until the test holds it."""
    pipeline = HeldPipeline()
    engine = Engine(build_config(**settings), lambda config, device: pipeline)
    engine.start()
    pipeline.batches.clear()
    pipeline.num_steps_done = 0
    try:
        yield engine, pipeline
    finally:
        pipeline.free = True
        pipeline.steps.release(10_000)
        engine.close()


@contextmanager
def client_of(**settings: Any) -> Iterator[tuple[TestClient, HeldPipeline, Engine]]:
    with held_engine(**settings) as (engine, pipeline):
        app = build_app(engine, engine._config)
        with TestClient(app, raise_server_exceptions=False) as client:
            yield client, pipeline, engine


def error_of(answer: Any) -> dict[str, Any]:
    document = answer.json()
    assert document.keys() == {"error"}
    assert document["error"].keys() == {"code", "message", "field"}
    return document["error"]


def build_request(
    *prompts: str, seed: int = 0, negative_prompt: str = "", **kind: Any
) -> ImageRequest:
    given = {"width": SIDE, "height": SIDE, "steps": 2, "guidance": 2.0, "scheduler": "dpm++"}
    return ImageRequest(prompts, negative_prompt, seed, Kind(**(given | kind)))


def wait_until(holds: Callable[[], object]) -> None:
    """Poll until a condition holds; fail after a while."""
    deadline = time.monotonic() + WAIT_SEC
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def build_pipeline(seed: int = 0) -> Any:
    """The tiny model's VAE and text encoder around a U-Net of random weights."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = UNet2DConditionModel.load_config(TINY_MODEL / "unet")
        unet = UNet2DConditionModel.from_config(config).eval()
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_MODEL, unet=unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels_of(image: ServedImage) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image.png))).astype(int)


class ServerProcess:
    """`python -m serve run` as a process, reached by its port."""

    def __init__(self, *flags: object, **environment: str) -> None:
        command = [sys.executable, "-m", "serve", "run", "--port", "0", *map(str, flags)]
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # it comes once the model is loaded
        found = re.search(r" at (http://\S+:\d+)$", line)
        assert found, f"{line!r} {self.process.communicate()[1][-2000:]}"
        self.url = found[1]
        wait_until(lambda: self.get("/ping")[0] == 200)

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; 0 where nobody listens."""
        return self._ask(urllib.request.Request(self.url + path))

    def post(self, path: str, document: Any, **headers: str) -> tuple[int, bytes]:
        """Status and body; 0 where nobody listens."""
        data = json.dumps(document).encode()
        headers = {"content-type": "application/json", **headers}
        return self._ask(urllib.request.Request(self.url + path, data, headers))

    def _ask(self, request: urllib.request.Request) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        except OSError:
            return 0, b""

    def end(self) -> None:
        """Whatever it is doing."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def served(*flags: object, **environment: str) -> Iterator[ServerProcess]:
    server = ServerProcess(*flags, **environment)
    try:
        yield server
    finally:
        server.end()


def save_pipeline(folder: Path) -> Path:
    """`build_pipeline` as a folder that --source takes."""
    build_pipeline().save_pretrained(folder)
    return folder
