"""One corpus with every kind of bad input: the job ends, says what it dropped, keeps the rest."""

import gzip
import hashlib
import io
import json
import re
import socket
import struct
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import image_bytes, sample_members, smooth_image, write_tar
from PIL import Image

from precompute.__main__ import main
from precompute.config import PrecomputeConfig
from precompute.job import precompute
from precompute.pixels import Picture, UnusableImageError
from shards.arrays import map_arrays
from shards.dataset import Dataset
from shards.errors import UserError
from shards.ledger import read_ledger
from shards.receipt import read_receipt
from shards.retry import RetryPolicy
from shards.verify import iter_problems

Members = list[tuple[str, bytes]]


def good(seed: int = 0, width: int = 40, height: int = 44) -> bytes:
    return image_bytes(smooth_image(np.random.default_rng(seed), width, height))


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it has side² pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1 << 16)))


JPEG = image_bytes(smooth_image(np.random.default_rng(1), 60, 50), "JPEG")
BAD_IMAGES = {
    "zero": (b"", "empty_image"),
    "one byte": (b"\xff", "not_an_image"),
    "cut png": (good()[:300], "broken_image"),
    "cut jpeg": (JPEG[: len(JPEG) // 2], "broken_image"),
    "html": (b"<!doctype html><html>404</html>", "not_an_image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not_an_image"),
    "pdf": (b"%PDF-1.7\n1 0 obj\n", "not_an_image"),
    "eps": (image_bytes(Image.new("RGB", (40, 40)), "EPS"), "not_an_image"),
    "bomb": (bomb(12_000), "too_many_pixels"),
    "big bomb": (bomb(60_000), "too_many_pixels"),
    "banner": (image_bytes(Image.new("RGB", (900, 40))), "absurd_aspect_ratio"),
    "ruler": (image_bytes(Image.new("RGB", (40, 900))), "absurd_aspect_ratio"),
}
ODD_KEYS = ["../../x", "/etc/passwd", "a/../../b", "C:\\x", "~", "ключ", "a\tb\nc", "x" * 3000]
SAMPLES: dict[str, str] = {key: reason for key, (_, reason) in BAD_IMAGES.items()} | {
    "good 0": "ok",
    **dict.fromkeys(ODD_KEYS, "ok"),
    "small": "ok",
    "no caption": "no_caption",
    "blank caption": "no_caption",
    "latin-1 caption": "caption_not_utf8",
    "text alone": "no_image",
    "json list": "broken_json",
    "json cut": "broken_json",
    "json surrogate": "broken_json",
    "unwanted": "filter: punsafe < 0.5",
    "unrated": "filter: no punsafe",
    "good 1": "ok",
}


def as_members(samples: dict[str, str]) -> Members:
    """The samples as img2dataset writes them, each with what its name says is wrong with it."""
    members: Members = []
    for number, key in enumerate(samples):
        image = BAD_IMAGES[key][0] if key in BAD_IMAGES else good(number)
        punsafe: Any = {"unwanted": 0.9, "unrated": None}.get(key, 0.1)
        parts = sample_members(
            key, good(number, 20, 20) if key == "small" else image, f"lion {key}"
        )
        one = {name[len(key) + 1 :]: data for name, data in parts}
        one["json"] = json.dumps({"punsafe": punsafe, "url": key}).encode()
        match key:
            case "no caption":
                del one["txt"]
            case "blank caption":
                one["txt"] = b" \n\t"
            case "latin-1 caption":
                one["txt"] = b"caf\xe9"
            case "text alone":
                del one["jpg"]
            case "json list":
                one["json"] = b"[1]"
            case "json cut":
                one["json"] = b'{"punsafe": 0.'
            case "json surrogate":
                one["json"] = b'{"punsafe": 0.1, "x": "\\ud800"}'
        members += [(f"{key}.{suffix}", data) for suffix, data in one.items()]
    return members


class Corpus:
    """Image shards on disk and on a server, and what is to become of each sample."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.expected: dict[str, dict[str, str]] = {}
        self.unreadable = [f"{url}/gone.tar", f"{url}/refused.tar"]
        self.web_files: dict[str, bytes] = {}
        self._write_tars()
        self._write_parquets()
        self._web_shard("served", dict.fromkeys(["web"], "ok"))

    @property
    def patterns(self) -> str:
        served = [f"{self.unreadable[0].rpartition('/')[0]}/served.tar"]
        return " ".join([f"{self.folder}/*", *served, *self.unreadable])

    @property
    def num_shards(self) -> int:
        return len(self.expected) + len(self.unreadable)

    def _write_tars(self) -> None:
        members = as_members(SAMPLES)
        write_tar(self.folder / "all.tar", members)
        self.expected["all"] = dict(SAMPLES)
        whole = (self.folder / "all.tar").read_bytes()
        (self.folder / "packed.tar.gz").write_bytes(gzip.compress(whole, mtime=0))
        self.expected["packed"] = dict(SAMPLES)
        rest = dict.fromkeys(["first", "second"], "ok")
        cut = write_tar(self.folder / "cut.tar", as_members(rest))
        with tarfile.open(cut) as tar:
            end = tar.getmembers()[3].offset_data + 50  # within the second's image
        cut.write_bytes(cut.read_bytes()[:end])
        self.expected["cut"] = {"first": "ok", "<rest of cut>": "broken_shard"}
        noise = np.random.default_rng(0).integers(0, 256, 50_000, dtype=np.uint8).tobytes()
        one = write_tar(
            self.folder / "bad-gz.tar", [*as_members({"first": "ok"}), ("n.jpg", noise)]
        )
        packed = bytearray(gzip.compress(one.read_bytes(), mtime=0))
        one.unlink()
        packed[len(packed) * 3 // 4 :] = b""
        (self.folder / "bad-gz.tar.gz").write_bytes(packed)
        self.expected["bad-gz"] = {"first": "ok", "<rest of bad-gz>": "broken_shard"}
        write_tar(self.folder / "empty.tar", [])
        self.expected["empty"] = {"<shard empty>": "no_samples"}
        (self.folder / "zero.tar").write_bytes(b"")
        self.expected["zero"] = {"<shard zero>": "no_samples"}
        (self.folder / "noise.tar").write_bytes(b"no tar at all" * 99)
        self.expected["noise"] = {"<rest of noise>": "broken_shard"}
        twice = [*as_members({"a": "ok", "b": "ok"}), *as_members({"a": "ok"})]
        twice += [("c.jpg", good()), ("c.jpg", good(1)), ("c.txt", b"whose?")]
        write_tar(self.folder / "twice.tar", twice)
        self.expected["twice"] = {"a": "ok", "b": "ok", "a (again)": "duplicate_key"}
        self.expected["twice"]["c"] = "repeated_member"
        self._write_links()

    def _write_links(self) -> None:
        """Links and devices that point out of the folder, and a name with a NUL."""
        with tarfile.open(self.folder / "links.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)):
                info = tarfile.TarInfo(f"link{number}.jpg")
                info.type, info.linkname = kind, "../../../etc/passwd"
                tar.addfile(info)
            for name, data in as_members({"nul\0key": "ok"}):
                info = tarfile.TarInfo("x")
                info.size, info.pax_headers = len(data), {"path": name}
                tar.addfile(info, io.BytesIO(data))
        self.expected["links"] = {"nul\0key": "ok"}

    def _write_parquets(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        broken_members = {"text alone", "json list", "json cut", "json surrogate"}
        kept = {key: reason for key, reason in SAMPLES.items() if key not in broken_members}
        kept |= {"nul\0key": "ok", "none": "no_image"}
        rows = []
        for number, key in enumerate(kept):
            image = BAD_IMAGES[key][0] if key in BAD_IMAGES else good(number)
            size = {"small": good(number, 20, 20), "none": None}
            caption = {"no caption": None, "blank caption": b" \n", "latin-1 caption": b"caf\xe9"}
            punsafe = {"unwanted": 0.9, "unrated": None}
            row: dict[str, Any] = {"key": key, "jpg": size.get(key, image)}
            row["caption"] = caption.get(key, f"lion {key}".encode())
            rows.append({**row, "punsafe": punsafe.get(key, 0.1), "url": key})
        table = pa.Table.from_pylist([*rows, rows[list(kept).index("good 0")]])
        pq.write_table(table, self.folder / "table.parquet")
        self.expected["table"] = {**kept, "good 0 (again)": "duplicate_key"}
        data = (self.folder / "table.parquet").read_bytes()
        (self.folder / "cut-table.parquet").write_bytes(data[: len(data) // 2])
        self.expected["cut-table"] = {"<rest of cut-table>": "broken_shard"}

    def _web_shard(self, name: str, samples: dict[str, str]) -> None:
        path = write_tar(self.folder.parent / "web" / f"{name}.tar", as_members(samples))
        self.web_files[f"/{name}.tar"] = path.read_bytes()
        self.expected[name] = samples

    def reasons(self) -> Counter[str]:
        """How many samples are to be dropped for each reason."""
        found = Counter(reason for shard in self.expected.values() for reason in shard.values())
        del found["ok"]
        return found


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    """A server that has one shard, loses one between its look-up and its reading, and hangs up."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(200)

        def do_GET(self) -> None:
            if "refused" in self.path:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
            else:
                self._answer(404 if "gone" in self.path else 200)

        def _answer(self, status: int) -> None:
            data = files.get(self.path, b"x" * 10_240)
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = tmp_path_factory.mktemp("corpus") / "images"
    folder.mkdir()
    found = Corpus(folder, f"http://127.0.0.1:{server.server_port}")
    files |= found.web_files
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RetryPolicy(attempts=2, first_delay_sec=0.01)
    for module in ("storage", "source_files", "parquet_shards"):
        monkeypatch.setattr(f"shards.{module}.REMOTE", policy)


@pytest.fixture
def run(corpus: Corpus, model_folder: Path, tmp_path: Path) -> Callable[..., int]:
    """The command over the corpus; returns its exit status."""

    def run(**changed: object) -> int:
        options: dict[str, object] = {"shards": corpus.patterns, "out": tmp_path / "out"}
        options |= {"model": model_folder, "resolutions": "32", "device": "cpu"}
        options |= {"max_drop_frac": 1.0, "batch_size": 4, "filter": "punsafe < 0.5"}
        try:
            main([f"--{k.replace('_', '-')}={v}" for k, v in (options | changed).items()])
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return run


def statuses_of(out: Path, shard: str) -> dict[str, str]:
    """What became of each key; a second sample of a key is `<key> (again)`."""
    found: dict[str, str] = {}
    for row in read_ledger(out / "ledger" / f"{shard}.parquet"):
        key = row["key"] + (" (again)" if row["key"] in found else "")
        found[key] = row["status"]
    return found


def assert_sums_hold(out: Path) -> None:
    dataset = Dataset(out)
    for shard in dataset.ledger:
        rows_in = len(read_ledger(out / "ledger" / f"{shard}.parquet"))
        for folder in ("ledger", *dataset.columns):
            receipt = read_receipt(out / folder / f"{shard}.json")
            assert receipt.rows_in == rows_in == receipt.rows + sum(receipt.absent.values())
    assert list(iter_problems(out, full=True)) == []


def all_files(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def table_of(text: str) -> dict[str, list[str]]:
    """The end table: first cells, which have no two spaces, to the others."""
    lines = text[text.rindex(" source rows in ") :].splitlines()[1:]
    return {cells[0]: cells[1:] for line in lines if (cells := re.split(r"  +", line.strip()))}


def test_every_kind_of_bad_input_is_in_the_table_and_the_good_samples_are_all_there(
    run, corpus, tmp_path, capsys
):
    out, before = tmp_path / "out", all_files(corpus.folder.parent)
    assert run() == 2
    shown = capsys.readouterr()
    assert f"2 of {corpus.num_shards} shards unread" in shown.err
    assert "Traceback" not in shown.err
    for shard, expected in corpus.expected.items():
        assert statuses_of(out, shard) == expected, shard
    assert Dataset(out).ledger.keys() == corpus.expected.keys()
    assert_sums_hold(out)
    # Nothing outside the dataset, and nothing in it that it does not name.
    assert all_files(corpus.folder.parent) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    names = {f"{shard}.{s}" for shard in (*corpus.expected, "null") for s in ("json", "parquet")}
    names |= {f"{shard}.safetensors" for shard in (*corpus.expected, "null")}
    assert {path.name for path in out.glob("*/*")} <= names

    table, reasons = table_of(shown.out), corpus.reasons()
    rows_in = sum(map(len, corpus.expected.values()))
    assert f"{rows_in:,} source rows in {len(corpus.expected)} shards" in shown.out
    assert table["unreadable shards: 2, not in these numbers"] == []
    for reason, count in reasons.items():
        assert table[reason] == [f"{count:,}", f"{count / rows_in:.1%}"], reason
    total = sum(reasons.values())
    assert table["all of these"] == [f"{total:,}", f"{total / rows_in:.1%}"]
    listed = [name for name in table if name in reasons]
    assert listed == sorted(reasons, key=lambda reason: (-reasons[reason], reason))
    (moments,) = [cells for name, cells in table.items() if name.startswith("moments-32-")]
    too_small = sum(key == "small" for shard in corpus.expected.values() for key in shard)
    assert moments[0] == f"{rows_in - total - too_small:,}"
    assert moments[3] == f"{too_small} too_small"
    (text,) = [cells for name, cells in table.items() if name.startswith("text-")]
    assert (text[0], text[3]) == (f"{rows_in - total:,}", "-")
    columns = [line for line in shown.out.splitlines() if re.match(r"  (moments|text)-\w", line)]
    assert len({line.index(f" {line.split()[1]} ") + len(line.split()[1]) for line in columns}) == 1


def test_good_samples_have_the_pixels_and_captions_that_they_had(run, corpus, tmp_path):
    """Beside all that is bad: each good row's latents are those of its picture alone."""
    run()
    alone = write_tar(tmp_path / "alone.tar", as_members({"good 0": "ok"}))
    keys = [key for key, reason in SAMPLES.items() if reason == "ok"]
    members = [m for m in as_members(SAMPLES) if any(m[0].startswith(f"{key}.") for key in keys)]
    write_tar(alone, members)
    run(shards=alone, out=tmp_path / "clean")
    dirty, clean = Dataset(tmp_path / "out"), Dataset(tmp_path / "clean")
    found = dirty.image_column(32).map_shard("all")
    wanted = clean.image_column(32).map_shard("alone")
    assert len(wanted["row"]) == len(keys) - 1  # one is too small
    np.testing.assert_allclose(found["moments"], wanted["moments"], rtol=2**-10, atol=1e-5)
    names = ["key", "caption", "sha256", "url"]
    rows = read_ledger(dirty.path / "ledger" / "all.parquet", names)
    assert [rows[row]["key"] for row in found["row"]] == [key for key in keys if key != "small"]
    assert {row["caption"] for row in rows if row["key"] in keys} == {f"lion {k}" for k in keys}


def test_a_resolution_added_later_and_the_same_again(run, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    run()
    before = all_files(out)
    capsys.readouterr()
    assert run() == 2  # the two are tried again, and nothing else
    assert f"2 of {corpus.num_shards} shards to encode" in capsys.readouterr().out
    assert all_files(out) == before
    assert run(resolutions="16,32") == 2
    after = all_files(out)
    assert {path: after[path] for path in before if "dataset.json" not in path}.items() <= (
        before.items()
    )
    dataset = Dataset(out)
    assert dataset.resolutions() == [16, 32]
    assert dataset.image_column(16).num_rows == dataset.text_column().num_rows
    assert_sums_hold(out)


@pytest.mark.parametrize(("limit", "status"), [(0.3, 1), (1.0, 0)])
def test_status_one_is_for_rows_and_two_for_shards(run, corpus, limit, status):
    assert run(shards=f"{corpus.folder}/*", max_drop_frac=limit) == status
    assert run(max_drop_frac=limit) == 2


def test_shards_that_can_be_read_again_complete_the_dataset(run, corpus, tmp_path, monkeypatch):
    run()
    missing = tmp_path / "later" / "gone.tar"
    write_tar(missing, as_members({"back": "ok"}))
    assert run(shards=f"{corpus.folder}/* {missing}") == 0
    assert statuses_of(tmp_path / "out", "gone") == {"back": "ok"}
    assert_sums_hold(tmp_path / "out")


def test_an_object_store_that_cannot_be_reached_costs_its_shards_alone(
    run, corpus, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # discard: nothing listens
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    pytest.importorskip("s3fs")
    assert run(shards=f"{corpus.folder}/all.tar s3://bucket/00000.tar") == 2
    shown = capsys.readouterr().err
    assert "s3://bucket/00000.tar" in shown
    assert "Traceback" not in shown
    assert statuses_of(tmp_path / "out", "all")
    assert not (tmp_path / "out" / "ledger" / "00000.json").exists()
    assert_sums_hold(tmp_path / "out")


# Columns that come later.


def config(out: Path, shards: Path, model: Path, **options: Any) -> PrecomputeConfig:
    settings: dict[str, Any] = {"resolutions": "32", "device": "cpu", "max_drop_frac": 1.0}
    return PrecomputeConfig(
        shards=str(shards), out=str(out), model=str(model), **(settings | options)
    )


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    samples = {"a": "ok", "cut png": "broken_image", "b": "ok", "c": "ok"}
    return write_tar(tmp_path / "images" / "00000.tar", as_members(samples))


@pytest.mark.parametrize("reason", ["broken_image", "not_an_image"])
def test_a_sample_that_a_later_decoder_cannot_read_is_absent_from_the_new_column_alone(
    tmp_path, shard, model_folder, monkeypatch, reason
):
    """Also where the ledger has dropped others for the same reason."""
    out = tmp_path / "out"
    precompute(config(out, shard, model_folder))
    before = all_files(out / "ledger")
    decode = Picture.decode

    def failing(self: Picture, divisor: int = 1) -> Any:
        if self._data == good(2):  # of b
            raise UnusableImageError(reason)
        return decode(self, divisor)

    monkeypatch.setattr(Picture, "decode", failing)
    precompute(config(out, shard, model_folder, resolutions="16,32"))
    dataset = Dataset(out)
    assert dataset.image_column(32).absent == {"broken_image": 1}
    added = dataset.image_column(16)
    assert Counter(added.absent) == Counter(["broken_image", reason])
    assert map_arrays(added.path_of("00000"))["row"].tolist() == [0, 3]
    assert all_files(out / "ledger") == before
    assert_sums_hold(out)


def test_a_column_of_text_alone_reads_no_image_shard(tmp_path, shard, model_folder):
    """The ledger has the captions: the tar may be spoiled as long as it is as long as it was."""
    out = tmp_path / "out"
    precompute(config(out, shard, model_folder, text="none"))
    assert [c.spec.kind for c in Dataset(out).columns.values()] == ["image"]
    shard.write_bytes(bytes(shard.stat().st_size))
    before = all_files(out)
    precompute(config(out, shard, model_folder, resolutions="none"))
    after = all_files(out)
    assert {p for p, digest in before.items() if after[p] != digest} == {str(out / "dataset.json")}
    dataset = Dataset(out)
    dataset.check_trainable(dataset.image_column(32), dataset.text_column())
    assert dataset.text_column().num_rows == 3
    assert_sums_hold(out)
    shard.unlink()  # the shards say what the job is about, so without them there is none
    with pytest.raises(UserError, match="no such image shard"):
        precompute(config(out, shard, model_folder, resolutions="none", text="ids"))
    assert all_files(out) == after


def test_a_second_models_text_touches_nothing_else(tmp_path, shard, model_folder):
    import shutil

    from safetensors.numpy import load_file, save_file

    other = shutil.copytree(model_folder, tmp_path / "other")
    weights = other / "text_encoder" / "model.safetensors"
    tensors = {name: tensor * 1.01 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    out = tmp_path / "out"
    precompute(config(out, shard, model_folder))
    before = all_files(out)
    precompute(config(out, shard, other, resolutions="none"))
    after = all_files(out)
    assert {p for p, digest in before.items() if after[p] != digest} == {str(out / "dataset.json")}
    texts = [c for c in Dataset(out).columns.values() if c.spec.kind == "text"]
    first, second = (column.map_shard("00000") for column in texts)
    assert np.array_equal(first["caption"], second["caption"])
    assert not np.array_equal(first["states"], second["states"])
    new = {Path(path).parent.name for path in after.keys() - before.keys()}
    assert len(new) == 1


def test_the_caption_field_takes_the_place_of_txt_and_is_held_to(tmp_path, model_folder):
    members: Members = []
    for number, field in enumerate([{"alt": " a tree "}, {"alt": ""}, {}, {"alt": 7}]):
        members += sample_members(str(number), good(number), "not this", field)
    shard = write_tar(tmp_path / "images" / "00000.tar", members)
    out = tmp_path / "out"
    precompute(config(out, shard, model_folder, caption_field="alt"))
    rows = read_ledger(out / "ledger" / "00000.parquet")
    assert [row["caption"] for row in rows] == ["a tree", "", None, None]
    assert [row["status"] for row in rows] == ["ok", *["no_caption"] * 3]
    assert Dataset(out).caption_field == "alt"
    for other in ("", "caption"):
        with pytest.raises(UserError, match="--caption-field"):
            precompute(config(out, shard, model_folder, caption_field=other, resolutions="16"))
    assert {path.name for path in tmp_path.iterdir()} == {"images", "out"}
