"""A job does what is missing, once, and the same command always ends in the same bytes."""

import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import image_bytes, run_python, sample_members, smooth_image, write_tar

from precompute.config import PrecomputeConfig
from precompute.job import precompute
from shards.column import Json
from shards.errors import DatasetError, UserError
from shards.lock import sole_writer
from shards.repair import repair
from shards.verify import iter_problems


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of five and three pictures; one is broken, one too small for 40 pixels."""
    folder = tmp_path_factory.mktemp("few-images")
    rng = np.random.default_rng(0)
    for shard, keys in (("00000", "abcde"), ("00001", "fgh")):
        members: list[tuple[str, bytes]] = []
        for key in keys:
            data = image_bytes(smooth_image(rng, 36 if key == "b" else 48, 44))
            caption = "a lion" if key < "d" else "a leaf"
            members += sample_members(key, b"broken" if key == "g" else data, caption)
        write_tar(folder / f"{shard}.tar", members)
    return folder


@pytest.fixture
def run(images: Path, model_folder: Path, tmp_path: Path) -> Callable[..., None]:
    """`run(out, **options)`: the same job every time."""

    def run(out: Path | str = "out", **options: Any) -> None:
        defaults: Json = {"shards": f"{images}/*.tar", "resolutions": "32,40", "batch_size": 2}
        defaults |= {"model": str(model_folder), "device": "cpu"}
        precompute(PrecomputeConfig(out=str(tmp_path / out), **defaults | options))

    return run


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, Any]:
    """Every file by name; receipts without their timings."""
    found: dict[str, Any] = {}
    for path in files_of(folder):
        name = str(path.relative_to(folder))
        if path.suffix == ".json" and path.parent != folder:
            receipt = json.loads(path.read_bytes())
            del receipt["timings"]
            found[name] = receipt
        else:
            found[name] = path.read_bytes()
    return found


def ages(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files_of(folder)}


def written_since(before: dict[str, int], folder: Path) -> set[str]:
    return {name for name, age in ages(folder).items() if before.get(name) != age}


def column_of(name: str) -> str:
    """`moments-32/00000.safetensors` for a file in a column: without the fingerprint."""
    return re.sub(r"-[0-9a-f]{8}/", "/", name)


def test_two_runs_of_one_job_write_the_same_bytes(run, tmp_path):
    run("a")
    run("b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert list(iter_problems(tmp_path / "a", full=True)) == []


def test_the_same_command_again_does_nothing_and_says_so(run, tmp_path, capsys):
    run()
    before = ages(tmp_path / "out")
    capsys.readouterr()
    run()
    assert ages(tmp_path / "out") == before
    text = capsys.readouterr().out
    assert "all 2 shards are there already, nothing to do" in text
    assert "8 source rows in 2 shards" in text


def test_a_job_with_nothing_to_do_loads_no_heavy_library(run, images, model_folder, tmp_path):
    run()
    arguments = [f"--shards={images}/*.tar", f"--out={tmp_path / 'out'}", f"--model={model_folder}"]
    arguments += ["--resolutions=40,32", "--device=cpu", "--max-drop-frac=0.2"]
    code = (
        "import sys\n"
        "from precompute.__main__ import main\n"
        f"main({arguments!r})\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = run_python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing to do" in done.stdout


def test_another_resolution_encodes_that_column_alone(run, tmp_path, monkeypatch):
    run("at once")
    run(resolutions="32")
    before = ages(tmp_path / "out")

    def refuse(*_: Any) -> None:
        raise AssertionError("no caption has to be encoded again")

    monkeypatch.setattr("precompute.text_encoder.TextEncoder.encode", refuse)
    run(resolutions="40")
    names = {column_of(name) for name in written_since(before, tmp_path / "out")}
    files = itertools.product(("00000", "00001"), ("json", "safetensors"))
    assert names == {"dataset.json"} | {f"moments-40/{name}.{end}" for name, end in files}
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")


def test_more_shards_are_encoded_alone(run, images, tmp_path):
    run("at once")
    run(shards=f"{images}/00001.tar")
    before = ages(tmp_path / "out")
    run()
    new = written_since(before, tmp_path / "out")
    assert {Path(name).stem for name in new} == {"00000", "dataset"}
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")


def test_a_shard_does_not_depend_on_its_neighbours(run, images, tmp_path):
    run("both")
    run("one", shards=f"{images}/00001.tar")
    both, one = contents(tmp_path / "both"), contents(tmp_path / "one")
    for name in one.keys() - {"dataset.json"}:
        assert one[name] == both[name], name


def test_gaps_in_the_numbering_are_said_and_fine(run, images, tmp_path, capsys):
    run(shards=f"{images}/{{00000..00004}}.tar")
    text = capsys.readouterr().out
    assert f"3 shards of the pattern do not exist: {images}/00002.tar" in text
    assert "8 source rows in 2 shards" in text


def test_another_model_or_precision_is_another_column_beside_the_first(run, model_folder, tmp_path):
    run(resolutions="32")
    before = ages(tmp_path / "out")
    other = shutil.copytree(model_folder, tmp_path / "other model")
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    run(resolutions="32", model=str(other))
    run(resolutions="32", dtype="bfloat16")
    written = written_since(before, tmp_path / "out")
    assert written.isdisjoint(before.keys() - {"dataset.json"})
    folders = [path.name.rpartition("-")[0] for path in (tmp_path / "out").iterdir()]
    assert sorted(filter(None, folders)) == ["moments-32"] * 3 + ["text"] * 2


def test_notes_on_who_saved_the_model_make_no_other_column(run, model_folder, tmp_path):
    run()
    copy = shutil.copytree(model_folder, tmp_path / "model")
    for part in ("vae", "text_encoder"):
        config = json.loads((copy / part / "config.json").read_text())
        config |= {"_name_or_path": "/home/someone", "transformers_version": "4.0.0"}
        config |= {"_diffusers_version": "0.2.2"}
        (copy / part / "config.json").write_text(json.dumps(config))
    before = ages(tmp_path / "out")
    run(model=str(copy))
    assert ages(tmp_path / "out") == before


# Repair.


def test_whatever_single_file_is_lost_the_same_command_brings_it_back(run, tmp_path):
    run()
    out = tmp_path / "out"
    before = contents(out)
    for path in files_of(out):
        path.unlink()
        run()
        assert contents(out) == before, path
    assert list(iter_problems(out, full=True)) == []


def test_whatever_pair_of_data_and_receipt_is_lost_comes_back(run, tmp_path):
    run()
    out = tmp_path / "out"
    before = contents(out)
    for receipt in sorted(out.glob("*/*.json")):
        age = ages(out)
        for path in receipt.parent.glob(f"{receipt.stem}.*"):
            path.unlink()
        run()
        assert contents(out) == before, receipt
        rewritten = written_since(age, out)
        assert {Path(name).stem for name in rewritten} == {receipt.stem}
        assert {Path(name).parent.name for name in rewritten} == {receipt.parent.name}


def test_a_data_file_of_another_length_is_written_again(run, tmp_path):
    run()
    out = tmp_path / "out"
    before = contents(out)
    for path in [*out.glob("*/*.safetensors"), *out.glob("*/*.parquet")]:
        path.write_bytes(path.read_bytes()[:-7])
        run()
        assert contents(out) == before, path


def test_a_damaged_receipt_is_refused_and_its_remedy_helps(run, tmp_path):
    run()
    out = tmp_path / "out"
    before = contents(out)
    for path in sorted(out.glob("*/*.json")):
        path.write_bytes(path.read_bytes().replace(b"rows", b"Rows"))
        with pytest.raises(DatasetError, match="python -m shards repair") as error:
            run()
        assert str(path) in str(error.value)
        repair(out)
        run()
        assert contents(out) == before


def test_a_source_that_changed_its_length_is_refused_and_nothing_is_touched(run, images, tmp_path):
    copies = shutil.copytree(images, tmp_path / "images")
    run(shards=f"{copies}/*.tar")
    before = contents(tmp_path / "out")
    path = copies / "00001.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    for resolutions in ("32,40", "48"):
        with pytest.raises(DatasetError, match=r"00001\.tar: is not the shard 00001.*changed"):
            run(shards=f"{copies}/*.tar", resolutions=resolutions)
    assert contents(tmp_path / "out") == before


def test_a_source_of_equal_length_and_other_bytes_is_refused_when_it_is_read(run, images, tmp_path):
    copies = shutil.copytree(images, tmp_path / "images")
    run(shards=f"{copies}/*.tar")
    before = contents(tmp_path / "out")
    path = copies / "00000.tar"
    path.write_bytes(path.read_bytes().replace(b"a lion", b"A LION"))
    with pytest.raises(DatasetError, match=r"00000\.tar: is not the shard 00000.*changed"):
        run(shards=f"{copies}/*.tar", resolutions="32,40,48")
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert not list((tmp_path / "out").glob("moments-48-*/00000.*"))


def test_a_source_that_is_gone_in_mid_job_costs_nothing_but_a_second_run(
    run, images, tmp_path, monkeypatch
):
    run("unbroken")
    copies = shutil.copytree(images, tmp_path / "images")
    for number in range(2, 9):  # some are opened ahead of time
        shutil.copy(images / "00001.tar", copies / f"{number:05d}.tar")

    def lose_one(*_: Any) -> None:
        (copies / "00007.tar").unlink(missing_ok=True)

    monkeypatch.setattr("precompute.shard_job._commit_ledger", lose_one)
    with pytest.raises(UserError, match=r"1 of 9 shards unread; .*00007\.tar: cannot be read"):
        run(shards=f"{copies}/*.tar")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"no such image shard"):
        run(shards=f"{copies}/00007.tar")
    shutil.copy(images / "00001.tar", copies / "00007.tar")
    run(shards=f"{copies}/*.tar")
    assert (tmp_path / "out" / "ledger" / "00008.json").exists()
    for name in ("ledger/00007.parquet", "ledger/00001.parquet"):
        wanted = (tmp_path / "unbroken" / "ledger" / "00001.parquet").read_bytes()
        assert (tmp_path / "out" / name).read_bytes() == wanted
    assert list(iter_problems(tmp_path / "out", full=True)) == []


def test_a_second_job_in_the_same_folder_is_refused_and_touches_nothing(run, tmp_path):
    with (
        sole_writer(tmp_path / "out"),
        pytest.raises(UserError, match="another process is writing here"),
    ):
        run()
    assert files_of(tmp_path / "out") == []


# Killed at any moment.


def attempt(job: Callable[[], None], *, die_at: int = 0, after_sec: float = 0.0) -> bool:
    """Run the job in another process and kill it with signal 9; did it end before?

    Args:
        die_at: at the how-manieth step on the way to the disk; files not yet renamed are torn.
        after_sec: or after this time.
    """

    def child() -> None:
        torch.set_num_threads(1)
        steps = itertools.count(1)
        fsync, replace = os.fsync, Path.replace

        def dying_fsync(descriptor: int) -> None:
            if next(steps) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        def dying_replace(self: Path, target: Path) -> Path:
            if next(steps) == die_at:
                os.truncate(self, self.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        os.fsync, Path.replace = dying_fsync, dying_replace  # type: ignore
        job()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(after_sec or 60)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


@pytest.fixture
def unbroken(run: Callable[..., None], tmp_path: Path) -> dict[str, Any]:
    run("unbroken")
    return contents(tmp_path / "unbroken")


@pytest.mark.parametrize("first", [1, 2, 3])
def test_killed_at_every_step_to_the_disk_it_ends_in_the_same_bytes(run, unbroken, tmp_path, first):
    killed = 0
    for step in itertools.count(first, 3):
        if attempt(run, die_at=step):
            break
        killed += 1
    assert killed >= 5
    assert contents(tmp_path / "out") == unbroken
    assert list(iter_problems(tmp_path / "out", full=True)) == []


def test_killed_at_random_moments_it_ends_in_the_same_bytes(run, unbroken, tmp_path):
    start = time.monotonic()
    assert attempt(lambda: run("timed"))
    longest_sec = time.monotonic() - start
    share, killed = random.Random(0), 0
    while killed < 4:
        if attempt(run, after_sec=longest_sec * share.uniform(0.2, 1.0)):
            shutil.rmtree(tmp_path / "out")  # it was quicker
            longest_sec *= 0.8
        else:
            killed += 1
    run()
    assert contents(tmp_path / "out") == unbroken
