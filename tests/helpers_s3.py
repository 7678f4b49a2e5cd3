"""A real S3-compatible server on loopback, and a proxy in front of it that fails on request."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from shards.storage import location

BUCKET = "bucket"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}

Matches = Callable[[str, str], bool]


class Faults:
    """What goes wrong next: each entry hits one request that it matches.

    Kinds: `500` and `503` answers; `reset` drops the connection before an answer; `stall` answers
    nothing for `stall_sec`; `short` cuts the body of the answer in half; `lost` carries the
    request out and then drops the connection, so that the client cannot know.
    """

    def __init__(self) -> None:
        self._planned: list[tuple[str, Matches]] = []
        self._lock = threading.Lock()
        self.hits: list[tuple[str, str, str]] = []
        self.requests: list[tuple[str, str]] = []
        self.stall_sec = 2.0

    def plan(self, kind: str, times: int = 1, where: Matches = lambda method, path: True) -> None:
        """Let the next `times` requests that match fail."""
        self._planned += [(kind, where)] * times

    def clear(self) -> None:
        """Forget what was planned and what was seen."""
        self._planned.clear()
        self.hits.clear()
        self.requests.clear()

    def take(self, method: str, path: str) -> str:
        """The fault that hits this request; empty when none does."""
        with self._lock:
            self.requests.append((method, path))
            for index, (kind, where) in enumerate(self._planned):
                if where(method, path):
                    del self._planned[index]
                    self.hits.append((kind, method, path))
                    return kind
        return ""


class S3:
    """Server, proxy and their addresses.

    Attributes:
        faults: of the proxy, which every client of `endpoint` talks to.
    """

    def __init__(self) -> None:
        self.faults = Faults()
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self._proxy = _proxy(self.faults, host, int(port))
        self.endpoint = f"http://127.0.0.1:{self._proxy.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """For a process of its own."""
        return {**CREDENTIALS, "FSSPEC_S3_ENDPOINT_URL": self.endpoint}

    def stop(self) -> None:
        """End both."""
        self._proxy.shutdown()
        self._proxy.server_close()
        self._server.stop()


@contextmanager
def running_s3(bucket: str) -> Iterator[S3]:
    """A server with a bucket, and this process set up to talk to it.

    All servers of one process share their buckets: modules take one each.
    """
    server = S3()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": server.endpoint})
        filesystem = location(f"s3://{bucket}").fs
        with suppress(FileExistsError):
            filesystem.mkdir(bucket)
        yield server
        filesystem.clear_instance_cache()
    server.stop()


def _proxy(faults: Faults, host: str, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms

        def handle_any(self) -> None:
            fault = faults.take(self.command, self.path)
            body = self._read_body()
            if fault == "stall":
                time.sleep(faults.stall_sec)
            if fault in ("reset", "stall"):
                return self._drop()
            if fault in ("500", "503"):
                code = {"500": "InternalError", "503": "ServiceUnavailable"}[fault]
                text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
                return self._answer(int(fault), [("Content-Type", "application/xml")], text)
            connection = http.client.HTTPConnection(host, port, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            data = response.read()
            if fault == "lost":
                return self._drop()
            self._answer(response.status, response.getheaders(), data, cut=fault == "short")
            connection.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

        def _read_body(self) -> bytes:
            if self.headers.get("Expect", "").lower() == "100-continue":
                self.send_response_only(100)
                self.end_headers()
            if self.headers.get("Transfer-Encoding", "") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            del self.headers["Transfer-Encoding"]
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
            return data

        def _answer(
            self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False
        ) -> None:
            self.send_response_only(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            is_head = self.command == "HEAD"
            lengths = [value for name, value in headers if name.lower() == "content-length"]
            length = lengths[0] if is_head and lengths else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            if not is_head:
                self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self._drop()

        def _drop(self) -> None:
            """Close with a reset, not an orderly end."""
            self.close_connection = True
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
