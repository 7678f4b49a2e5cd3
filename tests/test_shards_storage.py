"""Files appear whole or not at all, and one folder has one writer."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

from shards.canonical import canonical_json, sha256_of
from shards.errors import StorageError, UserError
from shards.lock import sole_writer
from shards.storage import write_text_whole, write_whole


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_was_written_is_all_that_is_there(tmp_path):
    path = tmp_path / "made" / "on" / "the way" / "file.json"
    write_text_whole(path, "one line\n")
    assert path.read_bytes() == b"one line\n"
    assert names_in(path.parent) == ["file.json"]


def test_a_write_that_fails_half_way_leaves_no_visible_file(tmp_path):
    def write_half(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(StorageError, match=r"file\.bin: cannot be written \(disk full\)"):
        write_whole(tmp_path / "file.bin", write_half)
    assert not (tmp_path / "file.bin").exists()


def test_a_write_that_fails_leaves_the_earlier_file_as_it_was(tmp_path):
    path = tmp_path / "file.bin"
    write_whole(path, lambda temporary: temporary.write_bytes(b"earlier"))

    def write_half(temporary: Path) -> None:
        temporary.write_bytes(b"half of the later")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, write_half)
    assert path.read_bytes() == b"earlier"


def test_the_file_is_not_there_before_it_is_whole(tmp_path):
    path = tmp_path / "file.bin"
    seen = []

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"whole")
        seen.append(path.exists())

    write_whole(path, write)
    assert seen == [False]


def test_leftovers_of_a_killed_process_are_overwritten_and_gone(tmp_path):
    path = tmp_path / "file.bin"
    code = (
        "import os, signal, sys; from pathlib import Path; from shards.storage import write_whole\n"
        "def write(temporary):\n"
        "    temporary.write_bytes(b'x' * 100_000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_whole(Path(sys.argv[1]), write)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], cwd=REPOSITORY, check=False)
    assert done.returncode == -signal.SIGKILL
    leftovers = names_in(tmp_path)
    assert leftovers
    assert path.name not in leftovers

    write_text_whole(path, "short")
    assert names_in(tmp_path) == [path.name]
    assert path.read_text() == "short"


def test_equal_documents_have_equal_texts_and_unequal_ones_do_not():
    assert canonical_json({"a": 1, "b": [1.5, "ü"]}) == canonical_json({"b": [1.5, "ü"], "a": 1})
    assert canonical_json({"a": 1}) != canonical_json({"a": 2})
    assert canonical_json({"a": 1}) != canonical_json({"a": "1"})


def test_a_number_that_json_does_not_have_is_never_written():
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"std": float("nan")})


def test_the_hash_of_a_file_is_that_of_sha256sum(tmp_path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_second_writer_in_another_process_is_refused_until_the_first_ends(tmp_path):
    code = (
        "import sys; from pathlib import Path; from shards.lock import sole_writer\n"
        "with sole_writer(Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(UserError, match=r"another process is writing here.*Remedy: ") as error,
            sole_writer(tmp_path),
        ):
            pass
        assert str(tmp_path) in str(error.value)
        other.kill()
    with sole_writer(tmp_path):
        pass
    assert names_in(tmp_path) == []


def test_a_second_writer_in_the_same_process_is_refused_too(tmp_path):
    with (
        sole_writer(tmp_path),
        pytest.raises(UserError, match="another process"),
        sole_writer(tmp_path),
    ):
        pass


def test_a_second_writer_that_may_wait_gets_its_turn(tmp_path):
    order = []

    def write_first() -> None:
        with sole_writer(tmp_path):
            order.append("first begins")
            started.set()
            time.sleep(0.3)
            order.append("first ends")

    started = threading.Event()
    first = threading.Thread(target=write_first)
    first.start()
    assert started.wait(timeout=10)
    with sole_writer(tmp_path, wait_sec=10):
        order.append("second begins")
    first.join()
    assert order == ["first begins", "first ends", "second begins"]


def test_the_lock_is_free_after_an_error(tmp_path):
    with (
        pytest.raises(OSError, match="disk full"),
        sole_writer(tmp_path),
    ):
        raise OSError("disk full")
    with sole_writer(tmp_path):
        assert names_in(tmp_path) == []


def test_a_folder_that_is_a_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "latents"
    path.write_text("not a folder")
    with pytest.raises(UserError, match=str(path)), sole_writer(path):
        pass
