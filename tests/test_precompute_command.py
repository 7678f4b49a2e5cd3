"""`python -m precompute`: exit status, account, and one line instead of a traceback."""

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import image_bytes, run_python, sample_members, smooth_image, write_tar

from precompute.__main__ import main
from shards.receipt import read_receipt

Run = Callable[..., int]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """One shard of ten pictures, three of them broken."""
    rng = np.random.default_rng(0)
    members: list[tuple[str, bytes]] = []
    for number in range(10):
        data = b"broken" if number < 3 else image_bytes(smooth_image(rng, 40, 40))
        members += sample_members(str(number), data, "a lion")
    return write_tar(tmp_path / "images" / "00000.tar", members)


@pytest.fixture
def run(images: Path, model_folder: Path, tmp_path: Path) -> Run:
    """The command with good arguments, but for those that are given; returns the exit status."""

    def run(**changed: object) -> int:
        arguments: dict[str, object] = {
            "shards": images,
            "out": tmp_path / "out",
            "model": model_folder,
        }
        arguments |= {"resolutions": "32", "device": "cpu", "max_drop_frac": 0.5}
        options = (arguments | changed).items()
        try:
            main([f"--{name.replace('_', '-')}={value}" for name, value in options])
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return run


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.startswith("precompute: error: ")


def test_a_good_command_ends_with_an_account_of_every_row(run, capsys):
    assert run() == 0
    captured = capsys.readouterr()
    assert "10 source rows in 1 shards" in captured.out
    rows = {line.split()[0]: line.split()[1:] for line in captured.out.splitlines() if line}
    assert rows["not_an_image"] == ["3", "30.0%"]
    (moments,) = [cells for name, cells in rows.items() if name.startswith("moments-32-")]
    assert moments[0] == "7"
    assert float(moments[1]) > 0
    assert moments[3] == "-"  # nothing absent beside those three


def test_the_time_account_names_every_stage_and_the_bottleneck(run, tmp_path, capsys):
    run()
    out = capsys.readouterr().out
    line, below = next(
        pair for pair in itertools.pairwise(out.splitlines()) if pair[0].startswith("encoded 10 ")
    )
    for stage in ("read", "decode", "transform", "encode moments-32", "encode text", "write"):
        assert re.search(rf"[ ,]{stage} \d+\.\d s", line), stage
    busy = {name: int(share) for name, share in re.findall(r"(\w+) (\d+)%", below)}
    assert busy.keys() == {"read", "decode", "encode", "write"}
    (slowest,) = re.findall(r"the bottleneck is (\w+)", below)
    assert busy[slowest] == max(busy.values())
    receipt = read_receipt(next((tmp_path / "out").glob("moments-32-*/00000.json")))
    stages = {"read", "decode", "transform", "encode", "write"}
    assert receipt.timings.keys() == {*stages, "decode_workers", "bottleneck"}
    assert receipt.timings["bottleneck"] in stages


@pytest.mark.parametrize(("limit", "status"), [(0.0, 1), (0.29, 1), (0.3, 0), (0.31, 0), (1.0, 0)])
def test_too_many_dropped_rows_are_status_one_and_the_dataset_stays(
    run, tmp_path, capsys, limit, status
):
    assert run(max_drop_frac=limit) == status
    captured = capsys.readouterr()
    assert ("30.0% of the wanted source rows were dropped" in captured.err) == (status == 1)
    assert ("Remedy: " in captured.err) == (status == 1)
    assert (tmp_path / "out" / "dataset.json").exists()
    assert run(max_drop_frac=limit) == status  # and again, with nothing to do
    assert "nothing to do" in capsys.readouterr().out


def test_small_pictures_are_no_dropped_rows(run):
    assert run(resolutions="48", max_drop_frac=0.3) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shards": "{tmp}/nowhere.tar"}, "nowhere.tar: no such image shard"),
        ({"shards": "{tmp}/*.tar"}, "no such image shard"),
        ({"shards": ""}, "no pattern given"),
        ({"shards": "nosuch://x/00000.tar"}, "nosuch"),
        ({"model": "{tmp}/nowhere"}, "no such folder"),
        ({"model": "{tmp}/file"}, "is a single file; wanted"),
        ({"model": "{tmp}/images"}, "model folder without vae/"),
        ({"model": "{tmp}/no weights"}, "no weights"),
        ({"model": "{tmp}/no tokenizer"}, "model folder without tokenizer/"),
        ({"model": "{tmp}/garbage"}, "cannot be loaded"),
        ({"model": "nobody/nothing-at-all"}, "not to be had from the hub"),
        ({"resolutions": "abc"}, "--resolutions: abc; wanted numbers"),
        ({"resolutions": ""}, "--resolutions: none given"),
        ({"resolutions": "30"}, "--resolutions: 30; wanted multiples of 8"),
        ({"resolutions": "0"}, "--resolutions: 0; wanted multiples of 8"),
        ({"dtype": "int8"}, "--dtype: int8; wanted one of auto"),
        ({"device": "toaster"}, "--device: toaster"),
        ({"out": "nowhere://bucket/latents"}, "nowhere://bucket/latents: cannot be reached"),
        ({"out": "{tmp}/file"}, "file: cannot be written to"),
        ({"out": "{tmp}/file/below"}, "below: cannot be written to"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_done_is_said_in_one_line_with_status_two(
    run, model_folder, tmp_path, capsys, changed, message
):
    (tmp_path / "file").write_text("x")
    for name, spoil in (
        ("no weights", lambda folder: next((folder / "vae").glob("*.safetensors")).unlink()),
        ("no tokenizer", lambda folder: shutil.rmtree(folder / "tokenizer")),
        ("garbage", lambda folder: (folder / "text_encoder/model.safetensors").write_text("x")),
    ):
        if name in str(changed):
            spoil(shutil.copytree(model_folder, tmp_path / name))
    assert run(**{name: value.format(tmp=tmp_path) for name, value in changed.items()}) == 2
    captured = capsys.readouterr()
    assert one_line(captured.err), captured.err
    assert message in captured.err
    out = tmp_path / "out"
    assert not out.exists() or not any(out.iterdir())


@pytest.mark.parametrize(
    "changed",
    [
        {"batch_size": 0},
        {"batch_size": -1},
        {"batch_size": "many"},
        {"decode_workers": -1},
        {"max_drop_frac": 1.5},
        {"max_drop_frac": -0.1},
        {"no_such_flag": 1},
    ],
    ids=str,
)
def test_a_number_that_makes_no_sense_is_refused_by_its_name(run, tmp_path, capsys, changed):
    assert run(**changed) == 2
    (name,) = changed
    assert name.replace("_", "-") in capsys.readouterr().err.replace("_", "-")
    assert not (tmp_path / "out").exists()


def test_the_interpreter_shows_no_traceback_and_passes_the_status_on(images, tmp_path):
    arguments = [f"--shards={images}", f"--out={tmp_path / 'out'}", "--device=cpu"]
    done = run_python("-m", "precompute", *arguments, "--model=nobody/nothing-at-all")
    assert done.returncode == 2
    assert one_line(done.stderr), done.stderr
    assert done.stdout == ""
