"""Image shards on web servers of all sorts: found, fetched whole, or a clear error."""

import gzip
import hashlib
import re
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import sample_members, write_tar

from shards.errors import UnreadableShardError, UserError
from shards.find_shards import find_shards
from shards.image_shards import ShardStream
from shards.retry import RetryPolicy
from shards.source_shard import SourceShard

FAST = RetryPolicy(attempts=3, first_delay_sec=0.01, factor=1.0)


class Web:
    """A server of bytes by path.

    Attributes:
        faults: what goes wrong with the next GETs: a status, `reset` before or `cut` in mid-answer,
            `stall`.
        has_length: whether it says lengths, and with HEAD too.
        headers: sent with every file.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.head_status = 0
        self.has_length = True
        self.headers: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                web.requests["HEAD"] += 1
                self._answer(str(web.head_status or ""))

            def do_GET(self) -> None:
                web.requests["GET"] += 1
                self._answer(web.faults.pop(0) if web.faults else "")

            def _answer(self, fault: str) -> None:
                path = self.path.partition("?")[0]
                data = web.files.get(path)
                if fault == "stall":
                    time.sleep(2)
                if fault in ("reset", "stall"):
                    return self._drop()
                status = int(fault) if fault.isdigit() else 404 if data is None else 200
                self.send_response(status)
                data = data if status == 200 and data is not None else b"an error page"
                if web.has_length:
                    self.send_header("Content-Length", str(len(data)))
                for name, value in web.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
                if fault == "cut":
                    self._drop()

            def _drop(self) -> None:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def web(monkeypatch, tmp_path) -> Iterator[Web]:
    monkeypatch.setattr("shards.storage.REMOTE", FAST)
    monkeypatch.setattr("shards.source_files.REMOTE", FAST)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    server = Web()
    yield server
    server.stop()
    left = [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert left == []


def tar_bytes(tmp_path: Path, *keys: str) -> bytes:
    members = [member for key in keys for member in sample_members(key, b"x" * 9000, "caption")]
    return write_tar(tmp_path / "made.tar", members).read_bytes()


@pytest.fixture
def shard(web, tmp_path) -> SourceShard:
    web.files["/a/00000.tar"] = tar_bytes(tmp_path, *"abc")
    (found,), gaps = find_shards(f"{web.url}/a/00000.tar")
    assert gaps == []
    assert found.num_bytes == len(web.files["/a/00000.tar"])
    web.requests.clear()
    return found


def keys_of(shard: SourceShard) -> list[str]:
    samples = list(ShardStream(shard))
    assert {sample.problem for sample in samples} == {""}
    return [sample.key for sample in samples]


# What is found.


def test_404_in_a_range_is_a_gap(web):
    web.files |= {f"/{number:05d}.tar": b"x" for number in (1, 3)}
    shards, gaps = find_shards(f"{web.url}/{{00000..00004}}.tar")
    assert [(shard.name, shard.num_bytes) for shard in shards] == [("00001", 1), ("00003", 1)]
    assert gaps == [f"{web.url}/{number:05d}.tar" for number in (0, 2, 4)]


@pytest.mark.parametrize(("status", "requests"), [(503, FAST.attempts), (403, 1), (401, 1)])
def test_another_error_is_no_gap(web, status, requests):
    web.files["/00000.tar"] = b"x"
    web.head_status, web.faults = status, [str(status)] * 9
    with pytest.raises(UserError, match=rf"00000\.tar: looking it up failed.*{status}"):
        find_shards(f"{web.url}/{{00000..00000}}.tar")
    assert web.requests["GET"] == requests


def test_503_that_passes_is_waited_for(web):
    web.files["/00000.tar"] = b"x"
    web.head_status, web.faults = 503, ["503"]
    shards, gaps = find_shards(f"{web.url}/{{00000..00000}}.tar")
    assert ([shard.name for shard in shards], gaps) == (["00000"], [])


def test_a_server_that_is_not_there_is_an_error_and_no_gap(web):
    web.stop()
    with pytest.raises(UserError, match=r"00000\.tar: looking it up failed 3 times"):
        find_shards(f"{web.url}/{{00000..00001}}.tar")


def test_one_server_of_two_that_is_not_there_costs_its_own_shards_alone(web):
    web.files["/00000.tar"] = b"x"
    gone = Web()
    gone.stop()
    shards, gaps = find_shards(f"{web.url}/00000.tar {gone.url}/00001.tar")
    assert [(shard.name, shard.num_bytes) for shard in shards] == [("00000", 1), ("00001", None)]
    assert gaps == []
    with pytest.raises(UnreadableShardError, match=r"00001\.tar"):
        list(ShardStream(shards[1]))


def test_a_signed_address_names_its_shard_without_the_query(web, tmp_path):
    web.files["/b/00000.tar.gz"] = gzip.compress(tar_bytes(tmp_path, *"ab"))
    signature = "?sig=a/b.parquet&x=" + "%2F[1]" * 300
    (found,), _ = find_shards(f"{web.url}/b/00000.tar.gz{signature}")
    assert found.name == "00000"
    assert keys_of(found) == ["a", "b"]


def test_a_star_works_where_the_server_lists_its_files_and_else_the_error_says_so(web):
    with pytest.raises(UserError, match="few web servers list their files: name them"):
        find_shards(f"{web.url}/a/*.tar")
    links = "".join(f'<a href="{name}">x</a>' for name in ("1.tar", "0.tar", "x.txt"))
    web.files |= {"/a/": links.encode(), "/a/0.tar": b"x", "/a/1.tar": b"xx", "/a/x.txt": b"x"}
    web.headers["Content-Type"] = "text/html"
    shards, _ = find_shards(f"{web.url}/a/*.tar")
    assert [(shard.name, shard.num_bytes) for shard in shards] == [("0", 1), ("1", 2)]
    assert find_shards(f"{web.url}/a/")[0] == shards


# How it gets here.


def test_a_server_that_says_no_length_is_read_alike(web, tmp_path):
    web.has_length = False
    web.files["/00000.tar"] = data = tar_bytes(tmp_path, *"abc")
    (found,), _ = find_shards(f"{web.url}/00000.tar")
    assert found.num_bytes is None
    stream = ShardStream(found)
    assert [sample.key for sample in stream] == ["a", "b", "c"]
    assert stream.num_bytes == len(data)
    assert stream.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("fault", ["reset", "cut", "503"])
def test_a_fault_costs_another_attempt_and_no_sample(web, shard, fault):
    web.faults = [fault] * (FAST.attempts - 1)
    assert keys_of(shard) == ["a", "b", "c"]
    assert web.requests["GET"] == FAST.attempts


def test_a_stall_ends_in_another_attempt(web, shard, monkeypatch):
    import aiohttp

    from shards import storage

    options = storage._web_options()
    assert options["client_kwargs"]["timeout"].total is None  # a large shard takes its time
    options["client_kwargs"]["timeout"] = aiohttp.ClientTimeout(sock_read=0.2)
    monkeypatch.setattr("shards.storage._web_options", lambda: options)
    web.faults = ["stall"]
    assert keys_of(shard) == ["a", "b", "c"]
    assert web.requests["GET"] == 2


@pytest.mark.parametrize("fault", ["reset", "cut", "503"])
def test_a_fault_that_stays_is_an_error_that_says_what_was_tried(web, shard, fault):
    web.faults = [fault] * 99
    samples = []
    message = rf"^{re.escape(shard.url)}: downloading failed 3 times in \d+ s .*Remedy: check"
    with pytest.raises(UnreadableShardError, match=message):
        samples += ShardStream(shard)
    assert samples == []
    web.faults.clear()


def test_a_shard_that_is_gone_is_an_error_at_once(web, shard):
    del web.files["/a/00000.tar"]
    with pytest.raises(UnreadableShardError, match=r"00000\.tar: cannot be read"):
        list(ShardStream(shard))
    assert web.requests["GET"] == 1


def test_fewer_bytes_than_were_announced_are_never_read_as_a_shard(web, shard):
    web.files["/a/00000.tar"] = web.files["/a/00000.tar"][:-100]
    with pytest.raises(UnreadableShardError, match=r"bytes arrived; wanted \d+,\d+, as its"):
        list(ShardStream(shard))


def test_a_file_stays_compressed_where_the_server_calls_that_its_encoding(web, tmp_path):
    web.files["/00000.tar.gz"] = data = gzip.compress(tar_bytes(tmp_path, *"ab"))
    web.headers["Content-Encoding"] = "gzip"
    (found,), _ = find_shards(f"{web.url}/00000.tar.gz")
    stream = ShardStream(found)
    assert [sample.key for sample in stream] == ["a", "b"]
    assert stream.sha256 == hashlib.sha256(data).hexdigest()


def test_nothing_is_left_of_a_reader_that_stops_and_two_read_side_by_side(web, shard, tmp_path):
    first, second = iter(ShardStream(shard)), iter(ShardStream(shard))
    assert next(first).key == next(second).key == "a"
    assert [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()] == []
    assert [sample.key for sample in first] == ["b", "c"]
    del second
