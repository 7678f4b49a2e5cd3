"""Downloading with the real img2dataset from a loopback site on which everything goes wrong."""

import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, image_bytes, smooth_image

from precompute import download_process
from precompute.download import DownloadConfig, download, main
from precompute.download_outcomes import OPTED_OUT, remove_unfinished
from precompute.download_process import PYTHON_VARIABLE, find_interpreter
from precompute.filters import Filter
from shards.errors import UserError
from shards.find_shards import find_shards
from shards.image_shards import ShardStream
from shards.storage import list_files, location

try:
    INTERPRETER = str(find_interpreter())
except UserError as error:
    INTERPRETER = ""
    WHY_NOT = str(error)
else:
    WHY_NOT = ""

needs_img2dataset = pytest.mark.skipif(not INTERPRETER, reason=WHY_NOT)
RNG = np.random.default_rng(0)
JPEG = image_bytes(smooth_image(RNG, 96, 64), "JPEG", quality=90)
PNG = image_bytes(smooth_image(RNG, 96, 64), "PNG")
SMALL = image_bytes(smooth_image(RNG, 20, 20), "JPEG")


class Site:
    """A web site; what a path does is its first part."""

    def __init__(self):
        self.requests = Counter()
        self.user_agents = set()
        self.open = threading.Event()  # until then, `/held/…` is not answered
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.requests[self.path] += 1
                site.user_agents.add(self.headers["User-Agent"])
                getattr(self, "do_" + self.path.split("/")[1])()

            def send(self, body=JPEG, length=None, **headers):
                self.send_response(200)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(length or len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_fine = send

            def do_png(self):
                self.send(PNG)

            def do_small(self):
                self.send(SMALL)

            def do_text(self):
                self.send(b"<html>no image</html>", Content_Type="image/jpeg")

            def do_optout(self):
                self.send(X_Robots_Tag="noai, noimageai")

            def do_otherbot(self):
                self.send(X_Robots_Tag="otherbot: noai")

            def do_ourbot(self):
                self.send(X_Robots_Tag="millbot: noai")

            def do_missing(self):
                self.send_error(404)

            def do_forbidden(self):
                self.send_error(403)

            def do_redirect(self):
                self.send_response(302)
                self.send_header("Location", "/fine/behind-redirect")
                self.end_headers()

            def do_busy(self):
                if site.requests[self.path] < 3:
                    self.send_error(503)
                else:
                    self.send()

            def do_down(self):
                self.send_error(503)

            def do_cut(self):
                self.send(JPEG[:100], len(JPEG))

            def do_reset(self):
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()

            def do_slow(self):
                self.send(JPEG[:100], len(JPEG))
                time.sleep(6)

            def do_held(self):
                site.open.wait(30)
                with suppress(OSError):
                    self.send()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # clients go away; that is the point
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.open.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site():
    site = Site()
    yield site
    site.close()


def write_list(path, site, paths, **columns):
    columns = {"URL": [site.url + one for one in paths], **columns}
    columns.setdefault("TEXT", [f"a caption of {one}" for one in paths])
    pq.write_table(pa.table(columns), path)
    return path


def arguments(urls, out, **options):
    defaults = {"samples_per_shard": 12, "processes": 2, "threads": 4, "pause_sec": 0, "passes": 0}
    return {"urls": str(urls), "out": str(out), "timeout_sec": 4, **defaults, **options}


def start(urls, out, **options):
    """The command as a process."""
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in arguments(urls, out, **options).items()]
    return subprocess.Popen(
        [sys.executable, "-m", "precompute.download", *flags],
        cwd=REPOSITORY,
        env={**os.environ, "NO_PROXY": "*"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(urls, out, **options):
    process = start(urls, out, **options)
    output, _ = process.communicate(timeout=90)
    return process.returncode, output


def keys_by_url(out):
    """URL to the keys under which the tars have it."""
    keys = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    url = json.load(tar.extractfile(member))["url"]
                    keys.setdefault(url, []).append(member.name)
    return keys


def outcomes_of(out):
    rows = pq.read_table(out / "_download" / "outcomes.parquet").to_pylist()
    return {"/" + row["url"].split("/", 3)[3]: row for row in rows}


PATHS = {  # path: downloaded, how often it is asked for with two further passes
    **{f"/fine/{number}": (True, 1) for number in range(8)},
    **{"/png/1": (True, 1), "/otherbot/1": (True, 1), "/redirect/1": (True, 1)},
    **{"/busy/1": (True, 3), "/down/1": (False, 3)},
    **{"/cut/1": (False, 3), "/reset/1": (False, 3), "/slow/1": (False, 3)},
    **{"/missing/1": (False, 1), "/forbidden/1": (False, 1), "/text/1": (False, 1)},
    **{"/optout/1": (False, 1), "/ourbot/1": (False, 1), "/small/1": (False, 1)},
}
REASONS = {
    **{"HTTP 503": 1, "timed out": 1, "HTTP 404": 1, "HTTP 403": 1, "not an image": 1},
    **{"connection broken": 2, "image too small": 1, OPTED_OUT: 2},
}


class Job:
    """A finished job over `PATHS`."""

    def __init__(self, folder):
        self.options = {"passes": 2, "min_side": 32, "user_agent_token": "MillBot"}
        self.site, self.out, count = Site(), folder / "out", len(PATHS)
        punsafe = [float("nan"), *(number / count for number in range(1, count))]
        columns = {"punsafe": punsafe, "width": [1] * count}
        self.urls = write_list(folder / "urls.parquet", self.site, PATHS, **columns)
        self.status, self.output = run(self.urls, self.out, **self.options)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("job"))
    yield job
    job.site.close()


@needs_img2dataset
def test_every_url_is_in_a_tar_once_or_accounted_for(job):
    assert job.status == 0, job.output
    # Two shards of the list; each further pass has one, the last with the one image that came.
    assert {path.name for path in job.out.glob("*_stats.json")} == {
        f"{shard:05d}_stats.json" for shard in range(4)
    }
    keys = keys_by_url(job.out)
    assert {url.removeprefix(job.site.url) for url in keys} == {p for p, e in PATHS.items() if e[0]}
    assert all(len(found) == 1 for found in keys.values())
    outcomes = outcomes_of(job.out)
    assert set(outcomes) == set(PATHS)
    for path, (downloaded, attempts) in PATHS.items():
        assert (outcomes[path]["status"] == "success") == downloaded, path
        assert outcomes[path]["attempts"] == attempts, path
        assert bool(outcomes[path]["error_message"]) != downloaded, path


@needs_img2dataset
def test_what_cannot_pass_is_asked_for_once(job):
    """Above all a site that has opted out."""
    seen = {path: count for path, count in job.site.requests.items() if path in PATHS}
    assert seen == {path: attempts for path, (_, attempts) in PATHS.items()}


@needs_img2dataset
def test_the_report_has_the_reasons_and_the_next_command(job):
    lines = job.output.splitlines()
    table = lines[lines.index(f"{len(PATHS)} URLs in {job.urls}") + 1 :]
    counts = {}
    for line in table[: len(REASONS) + 1]:
        count, _, text = line.split(maxsplit=2)
        counts[text] = int(count)
    assert counts == {"downloaded": 12, **REASONS}
    assert table[0].split() == ["12", f"{12 / len(PATHS):.1%}", "downloaded"]
    assert "connection broken" in table[1]
    assert OPTED_OUT in table[len(REASONS)]
    assert lines[-1] == f"continue with: make precompute SHARDS='{job.out}/*.tar'"


@needs_img2dataset
def test_the_crawler_says_who_it_is(job):
    assert len(job.site.user_agents) == 1
    assert "millbot" in job.site.user_agents.pop().lower()


@needs_img2dataset
def test_precompute_reads_what_came(job):
    shards, gaps = find_shards(f"{job.out}/*.tar")
    samples = [sample for shard in shards for sample in ShardStream(shard)]
    assert not gaps
    assert len(samples) == len({sample.key for sample in samples}) == 12
    for sample in samples:
        assert not sample.problem
        path = sample.metadata["url"].removeprefix(job.site.url)
        assert sample.caption == f"a caption of {path}"
        assert (sample.metadata["width"], sample.metadata["list_width"]) == (96, 1)
        row = list(PATHS).index(path)
        reason = Filter("punsafe < 0.2").reason_against(sample.metadata.get)
        assert bool(reason) == (row == 0 or row / len(PATHS) >= 0.2)
        if path.startswith("/fine"):
            assert sample.image == JPEG  # not encoded a second time
        source = PNG if path.startswith("/png") else JPEG
        assert sample.metadata["sha256"] == hashlib.sha256(source).hexdigest()
        assert sample.image.startswith(b"\xff\xd8")


@needs_img2dataset
def test_the_same_command_again_asks_for_nothing(job):
    before, files = job.site.requests.copy(), list_files(job.out)
    status, output = run(job.urls, job.out, **job.options)
    assert status == 0
    assert job.site.requests == before
    assert list_files(job.out) == files
    assert output.splitlines() == job.output.splitlines()[-len(output.splitlines()) :]


@needs_img2dataset
def test_too_few_images_are_a_failure(job):
    assert run(job.urls, job.out, **job.options, min_success_frac=0.54)[0] == 0
    status, output = run(job.urls, job.out, **job.options, min_success_frac=0.6)
    assert status == 1
    assert "54.5% downloaded; wanted at least 60.0%" in output


@needs_img2dataset
def test_another_list_or_setting_is_refused(job, tmp_path):
    files = list_files(job.out)
    other = write_list(tmp_path / "other.parquet", job.site, ["/fine/1"])
    with pytest.raises(UserError, match=r"another .*--urls.*--out"):
        download(DownloadConfig(**arguments(other, job.out, **job.options)))
    options = {**job.options, "min_side": 8, "timeout_sec": 7}
    with pytest.raises(UserError, match="another --min-side; wanted"):
        download(DownloadConfig(**arguments(job.urls, job.out, **options)))
    assert list_files(job.out) == files


@needs_img2dataset
def test_nothing_downloaded_is_a_failure(tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, and not listening
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/1.jpg"
        (tmp_path / "urls.txt").write_text(url)
        status, output = run(tmp_path / "urls.txt", tmp_path / "out")
    assert status == 1
    assert "host not reached" in output
    assert "wanted one at least" in output
    assert "make precompute SHARDS" not in output
    assert "no captions" in output


def descendants(pid):
    """Process ids of the children of a process, of theirs, and so on."""
    children = []
    with suppress(FileNotFoundError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return [*children, *(below for child in children for below in descendants(child))]


def command_of(pid):
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def workers_of(process):
    return [pid for pid in descendants(process.pid) if b"spawn_main" in command_of(pid)]


def runs(pid):
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    return False


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


@pytest.fixture
def half_done(site, tmp_path):
    """A running command that has finished its first shard and cannot finish its second."""
    paths = [f"/fine/{number}" for number in range(12)]
    paths += [f"/{'fine' if number % 2 else 'held'}/{number}" for number in range(12, 20)]
    urls, out = write_list(tmp_path / "urls.parquet", site, paths), tmp_path / "out"
    process = start(urls, out, timeout_sec=30)
    wait_until(lambda: (out / "00000_stats.json").exists() and (out / "00001.tar").exists())
    wait_until(lambda: sum(site.requests.values()) >= 16)
    wait_until(lambda: len(workers_of(process)) == 1)
    yield process, urls, out
    site.open.set()
    process.kill()
    process.communicate()


def assert_complete(out, site):
    keys = keys_by_url(out)
    assert len(keys) == 20
    assert all(len(found) == 1 for found in keys.values())
    assert {row["status"] for row in outcomes_of(out).values()} == {"success"}
    assert all(site.requests[f"/fine/{number}"] == 1 for number in range(12))  # finished before
    assert not [name for name in list_files(out) if name.endswith(".partial")]
    assert not (out / "_tmp").exists()


@needs_img2dataset
def test_a_killed_command_resumes(half_done, site):
    process, urls, out = half_done
    family = descendants(process.pid)
    assert len(family) >= 2
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(runs, family)), seconds=2)
    assert (out / "00001.tar").exists()  # half of it, which no one must take for a shard
    assert not (out / "00001_stats.json").exists()
    site.open.set()
    status, output = run(urls, out)
    assert status == 0, output
    assert_complete(out, site)


@needs_img2dataset
@pytest.mark.parametrize("which", ["main", "worker"])
def test_a_killed_process_of_img2dataset_is_replaced(half_done, site, which):
    """The kernel kills one when memory runs out; img2dataset's own pool would wait for ever."""
    process, _, out = half_done
    children = descendants(process.pid)
    (worker,) = workers_of(process)
    runner = next(pid for pid in children if b"download_runner" in command_of(pid))
    os.kill(runner if which == "main" else worker, signal.SIGKILL)
    site.open.set()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert not any(map(runs, children))
    assert_complete(out, site)


@needs_img2dataset
def test_a_stopped_command_leaves_no_half_shard(half_done):
    process, _, out = half_done
    family = descendants(process.pid)
    process.terminate()
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "the same command resumes" in output
    assert "Traceback" not in output
    assert [path.name for path in out.glob("*.tar")] == ["00000.tar"]
    assert not (out / "_tmp").exists()
    wait_until(lambda: not any(map(runs, family)), seconds=2)


@needs_img2dataset
def test_an_object_store_is_written_to_directly(site, tmp_path, monkeypatch):
    """With images that are scaled down, never up."""
    from helpers_s3 import running_s3

    urls = write_list(tmp_path / "urls.parquet", site, ["/fine/1", "/png/1", "/small/1", "/down/1"])
    with running_s3("download") as server:
        monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", server.endpoint)
        out = "s3://download/images"
        status, output = run(urls, out, image_size=32)
        assert status == 0, output
        assert f"make precompute SHARDS='{out}/*.tar'" in output
        assert remove_unfinished(location(out)) == ["00000"]
        (shard,), _ = find_shards(f"{out}/*.tar")
        sides = [(s.metadata["width"], s.metadata["height"]) for s in ShardStream(shard)]
        assert sorted(sides) == [(20, 20), (48, 32), (48, 32)]
        assert not list_files(location(f"{out}/_tmp"))


def test_without_the_environment_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(download_process, "_VENV", tmp_path / ".venv-download")
    with pytest.raises(SystemExit) as ended:
        main(["--urls", "none.txt"])
    assert ended.value.code == 2
    assert "make download-env" in capsys.readouterr().err
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "python"))
    with pytest.raises(UserError, match=PYTHON_VARIABLE):
        find_interpreter()


@pytest.fixture
def any_interpreter(monkeypatch):
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)


@pytest.mark.usefixtures("any_interpreter")
def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "urls.txt").write_text("http://127.0.0.1:9/1.jpg")
    out = tmp_path / "out"
    out.mkdir()
    (out / "00000.tar").write_bytes(b"somebody's work")
    with pytest.raises(UserError, match=r"holds 00000\.tar"):
        download(DownloadConfig(urls=str(tmp_path / "urls.txt"), out=str(out)))
    assert [path.name for path in out.iterdir()] == ["00000.tar"]


@pytest.mark.usefixtures("any_interpreter")
@pytest.mark.parametrize("name", ["a folder", "out*", "out{1}", "it's"])
def test_a_destination_that_precompute_could_not_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="white space, quotes"):
        download(DownloadConfig(urls="none.txt", out=str(tmp_path / name)))


@pytest.mark.usefixtures("any_interpreter")
def test_an_img2dataset_that_does_not_start_ends_the_job(tmp_path):
    """Our own interpreter has none."""
    (tmp_path / "urls.txt").write_text("http://127.0.0.1:9/1.jpg")
    with pytest.raises(UserError, match=r"finished no shard.*same command"):
        download(DownloadConfig(urls=str(tmp_path / "urls.txt"), out=str(tmp_path / "out")))


def test_make_writes_where_it_is_told_and_not_to_the_latents():
    def command(*settings):
        made = subprocess.run(
            ["make", "-n", "download", "LIST=urls.csv", *settings],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        return next(line for line in made.stdout.splitlines() if "precompute.download" in line)

    assert "--urls 'urls.csv'" in command()
    assert "--out" not in command()
    assert "--out 's3://bucket/images'" in command("OUT=s3://bucket/images")
