"""The page: complete in itself, and in a real browser it makes an image."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from fastapi.testclient import TestClient
from helpers_serve import SIDE, WAIT_SEC, held_engine, wait_until

from serve.app import build_app

PAGE = (REPOSITORY / "serve" / "page.html").read_text(encoding="utf-8")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


class Elements(HTMLParser):
    """Tags of a page, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(PAGE)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def test_nothing_is_loaded_from_elsewhere():
    assert not re.search(r"https?://|@import|url\(", PAGE)
    for tag, attributes in Elements().found:
        assert "src" not in attributes, tag
        if tag == "link":
            assert attributes["href"] == "data:,"


def test_the_browser_is_told_to_load_nothing_from_elsewhere():
    with held_engine() as (engine, _), TestClient(build_app(engine, engine._config)) as client:
        answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert answer.text == PAGE


def test_every_control_has_a_label():
    found = Elements().found
    labelled = {attributes["for"] for tag, attributes in found if tag == "label"}
    controls = {
        attributes["id"] for tag, attributes in found if tag in ("input", "textarea", "select")
    }
    assert controls == labelled


def test_every_field_of_a_request_can_be_given():
    from helpers_serve import build_config

    from serve.generator import ModelFacts
    from serve.request import build_request_model

    facts = ModelFacts(SIDE, SIDE, 8, 77, 1000)
    fields = set(build_request_model(build_config(), facts).model_fields) - {"format"}
    names = {attributes.get("name") for _, attributes in Elements().found}
    assert fields <= names


# A real browser -----------------------------------------------------------------------------------


class Browser:
    """Headless Chromium, spoken to through two pipes in its DevTools protocol."""

    def __init__(self, profile: Path) -> None:
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in (theirs_in, theirs_out)]

        def as_chromium_expects() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        self.process = subprocess.Popen(
            [CHROMIUM, *flags, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            preexec_fn=as_chromium_expects,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._out, self._in = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb")
        self._number, self._session = 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> bytes:
        data = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            assert byte, "the browser has ended"
            data += byte
        return bytes(data)

    def evaluate(self, script: str) -> Any:
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._out.close()
        self._in.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server in a thread."""
    import uvicorn

    with held_engine() as (engine, _):
        app = build_app(engine, engine._config)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        wait_until(lambda: server.started)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("no Chromium on the path")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Browser:
    """The browser with the page opened, and what the server says of itself in it."""
    browser.call("Page.navigate", url=f"{address}/")
    wait_until(lambda: browser.evaluate("document.getElementById('steps')?.value") == "25")
    return browser


WAIT = f"""
const until = async (holds) => {{
  const end = performance.now() + {WAIT_SEC * 1000};
  while (!holds()) {{
    if (performance.now() > end) throw new Error("never: " + holds);
    await new Promise((go) => setTimeout(go, 20));
  }}
}};
const at = (id) => document.getElementById(id);
"""


def run_in(page: Browser, script: str) -> Any:
    return page.evaluate(f"(async () => {{ {WAIT} {script} }})()")


def test_a_prompt_that_is_typed_becomes_an_image_with_its_seed(page):
    found = run_in(
        page,
        """
        at("prompt").value = "a red circle"; at("seed").value = "7";
        at("generate").click();
        await until(() => document.querySelector("figure img")?.complete);
        const picture = document.querySelector("figure img");
        return [picture.naturalWidth, picture.alt, document.querySelector("figcaption").innerText,
                at("status").textContent, at("progress").hidden];
        """,
    )
    width, alt, caption, status, is_done = found
    assert (width, alt) == (SIDE, "a red circle")
    assert "seed 7" in caption
    assert "1 image:" in status
    assert is_done


def test_an_image_for_each_line(page):
    script = """
        at("prompt").value = "a\\n\\nb\\n";
        document.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", ctrlKey: true }));
        await until(() => document.querySelectorAll("figure img").length == 2);
        return [...document.querySelectorAll("figure img")].map((picture) => picture.alt);
    """
    assert run_in(page, script) == ["a", "b"]


def test_an_error_stands_at_its_field_and_a_warning_above_the_images(page):
    script = """
        at("prompt").value = "1 2 3 4 5 6 7"; at("width").value = "65";
        at("generate").click();
        await until(() => at("width-error").textContent);
        const error = [at("width-error").textContent, at("width").getAttribute("aria-invalid"),
                       document.activeElement.id];
        at("width").value = "64";
        at("generate").click();
        await until(() => at("warnings").children.length);
        return [...error, at("warnings").textContent, at("width-error").textContent];
    """
    error, is_invalid, focused, warning, later = run_in(page, script)
    assert (error, is_invalid, focused) == ("Input should be a multiple of 8", "true", "width")
    assert "not seen: '6 7'" in warning
    assert later == ""


def test_what_a_prompt_says_is_text_and_never_markup(page):
    script = """
        at("prompt").value = "<img src=x onerror=alert(1)>";
        at("generate").click();
        await until(() => document.querySelector("figure img"));
        return [document.querySelectorAll("figcaption img").length,
                document.querySelector("figcaption p").textContent];
    """
    assert run_in(page, script) == [0, "<img src=x onerror=alert(1)>"]


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_the_page_fits_a_phone_and_a_desk(page, width):
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.call("Emulation.setDeviceMetricsOverride", **screen)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
