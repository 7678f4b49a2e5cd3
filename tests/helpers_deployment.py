"""A pipeline folder that answers in no time, and a server that goes wrong as it is told."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from conftest import TINY_MODEL, image_bytes
from PIL import Image

PNG = image_bytes(Image.new("RGB", (8, 8), "red"))


def build_pipeline_folder(folder: Path) -> Path:
    """The embedded model with a small U-Net of random weights: 64 pixels, milliseconds a step."""
    import torch
    from diffusers import UNet2DConditionModel
    from helpers_train import write_unet

    shutil.copytree(TINY_MODEL, folder)
    shutil.rmtree(folder / "unet")
    config = Path(write_unet(folder / "unet.json", cross_attention_dim=128))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(json.loads(config.read_text(encoding="utf-8")))
    unet.save_pretrained(folder / "unet")
    return folder


def images_answer(body: dict[str, Any]) -> dict[str, Any]:
    """What a server that is well answers."""
    prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
    seed = body.get("seed", 100)
    return {
        "images": [
            {
                "png": base64.b64encode(PNG).decode(),
                "prompt": prompt,
                "seed": seed + n,
                "flagged": None,
            }
            for n, prompt in enumerate(prompts)
        ],
        **{"width": 8, "height": 8, "steps": 25, "guidance": 5.0, "scheduler": "dpm++"},
        "warnings": [],
        "timings": {"queued_sec": 0.1, "generated_sec": 0.2, "batch_size": len(prompts)},
    }


def refusal(code: str, message: str, at: str | None = None) -> bytes:
    """The body of an error."""
    return json.dumps({"error": {"code": code, "message": message, "field": at}}).encode()


@dataclass
class Answer:
    """Of the fake server."""

    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeServer:
    """What a fake server was asked, and what it answers.

    Attributes:
        answer: from a request's path and JSON body, and how many there were before.
    """

    url: str
    answer: Callable[[str, dict[str, Any], int], Answer]
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """On loopback; it answers well until it is told otherwise."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def _answer(self, body: dict[str, Any]) -> None:
            with lock:
                number = len(fake.asked)
                fake.asked.append((self.path, dict(self.headers.items()), body))
            answer = fake.answer(self.path, body, number)
            data = answer.body
            if data is None:
                data = json.dumps(images_answer(body) if body else {}).encode()
            self.send_response(answer.status)
            for name, value in {"content-length": str(len(data)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256

        def handle_error(self, *_: object) -> None:
            """A client that does not wait for its answer is what some tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    fake = FakeServer(f"http://127.0.0.1:{server.server_port}", lambda *_: Answer())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
