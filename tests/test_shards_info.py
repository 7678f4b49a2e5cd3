"""`info` and the manners of all commands: one JSON document, one line of error, help that helps."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NUM_SHARDS, SHARD_LENGTH, TINY_MODEL, run_python, status_of

from precompute.config import PrecomputeConfig
from precompute.job import precompute
from shards.__main__ import build_parser
from shards.dataset import Dataset
from shards.info import describe

COMMANDS = ("info", "verify", "repair", "gc", "export", "index")
VARIANTS = [("moments", "fp16"), ("mean-int8", "ids"), ("moments-int8", "int8")]


@pytest.fixture
def small(tmp_path: Path, make_latent_dataset: Callable[..., Dataset]) -> Path:
    settings = {"num_tokens": 5, "dim": 8, "dropped": 2, "too_small": 1}
    return make_latent_dataset(tmp_path / "latents", [5, 3], resolutions=(32,), **settings).path


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, image_shards: Path) -> Dataset:
    """Every kind of column, from real jobs; 6 of 60 images are too small for 64 pixels."""
    out = tmp_path_factory.mktemp("stored") / "latents"
    settings: dict[str, Any] = {"shards": f"{image_shards}/*.tar", "model": str(TINY_MODEL)}
    for latents, text in VARIANTS:
        options = {"latents": latents, "text": text, "resolutions": "32,64", "device": "cpu"}
        precompute(PrecomputeConfig(out=str(out), **settings, **options))
    return Dataset(out)


# Bytes --------------------------------------------------------------------------------------------


def test_the_bytes_by_component_add_up_to_the_files(stored):
    info = describe(stored)
    assert len(info["columns"]) == 9
    for column_id, column in info["columns"].items():
        files = list((stored.path / column_id).glob("*.safetensors"))
        on_disk = sum(path.stat().st_size for path in files if path.stem != "null")
        assert column["bytes"] == on_disk
        per_sample = on_disk / column["rows"]
        assert column["bytes_per_sample"] == pytest.approx(per_sample, abs=0.05)
        parts = column["bytes_per_sample_by_component"]
        assert sum(parts.values()) == pytest.approx(per_sample, abs=0.3), column_id
        assert all(size >= 0 for size in parts.values())


def test_each_component_is_what_its_array_takes(stored):
    info = describe(stored)
    for column_id, column in info["columns"].items():
        sizes: dict[str, int] = {}
        for shard in stored.columns[column_id].shards:
            for name, array in stored.columns[column_id].map_shard(shard).items():
                sizes[name] = sizes.get(name, 0) + array.nbytes
        parts = column["bytes_per_sample_by_component"]
        assert parts.keys() == {*sizes, "headers"}
        for name, size in sizes.items():
            wanted = size / column["rows"]
            assert parts[name] == pytest.approx(wanted, rel=0.01, abs=0.06), (column_id, name)


def test_an_index_over_dropped_rows_is_counted_as_what_it_is(image_shards, tmp_path):
    """A text column has an index for each source row, the dropped ones too; headers have none."""
    from conftest import image_bytes, sample_members, smooth_image, write_tar

    rng = np.random.default_rng(0)
    members: list[tuple[str, bytes]] = []
    for number in range(40):
        data = image_bytes(smooth_image(rng, 40, 40)) if number % 4 == 0 else b"broken"
        members += sample_members(f"{number}", data, "a caption")
    write_tar(tmp_path / "00000.tar", members)
    precompute(
        PrecomputeConfig(
            shards=f"{tmp_path}/*.tar",
            out=str(tmp_path / "latents"),
            model=str(TINY_MODEL),
            resolutions="32",
            text="ids",
            device="cpu",
            max_drop_frac=1.0,
        )
    )
    dataset = Dataset(tmp_path / "latents")
    text = dataset.text_column()
    assert text.num_rows == 10
    parts = describe(dataset)["columns"][text.column_id]["bytes_per_sample_by_component"]
    assert parts["caption"] == pytest.approx(40 * 4 / 10)


def test_shared_captions_are_counted_once(stored):
    """Every caption of the fixture stands twice."""
    info = describe(stored)
    (ids,) = [c for name, c in info["columns"].items() if name.startswith("text-ids-")]
    assert ids["bytes_per_sample_by_component"]["input_ids"] == 77
    (means,) = [c for name, c in info["columns"].items() if name.startswith("mean-64-int8-")]
    assert means["bytes_per_sample_by_component"]["mean"] == 256
    assert means["bytes_per_sample_by_component"]["scale"] == 16


# The document -------------------------------------------------------------------------------------


def test_info_counts_rows_absences_and_the_ledger(stored):
    info = describe(stored)
    assert info["dataset"] == str(stored.path)
    assert info["num_shards"] == NUM_SHARDS
    assert info["source_rows"] == NUM_SHARDS * SHARD_LENGTH
    assert info["dropped_rows"] == 0
    ledger = (stored.path / "ledger").glob("*.parquet")
    assert info["ledger_bytes"] == sum(path.stat().st_size for path in ledger)
    for column_id, column in info["columns"].items():
        is_large = re.match(r"(mean|moments)-64", column_id)
        assert column["absent"] == ({"too_small": 6} if is_large else {})
        assert column["rows"] == (54 if is_large else 60)
        assert column["kind"] == ("text" if column_id.startswith("text") else "image")
        assert column["model"] == str(TINY_MODEL)


def test_info_shows_for_int8_columns_what_they_cost_in_precision(stored, capsys):
    assert status_of("info", stored.path) == 0
    text = capsys.readouterr().out
    errors = re.findall(r"int8: relative error ([\d.]+)%", text)
    with_error = [c for c in stored.columns.values() if "relative_error" in c.stats]
    assert len(errors) == len(with_error) == 5
    wanted = [round(100 * column.stats["relative_error"], 2) for column in with_error]
    assert [float(error) for error in errors] == pytest.approx(wanted, abs=0.006)


def test_info_for_people_and_for_programs_agree(stored, capsys):
    assert status_of("info", stored.path) == 0
    text = capsys.readouterr().out
    assert status_of("info", stored.path, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == describe(stored)
    for column_id, column in document["columns"].items():
        (line,) = [line for line in text.splitlines() if line.strip().startswith(column_id)]
        assert f"{column['rows']:,}" in line
        assert f"{column['bytes_per_sample']:,.0f}" in line


def test_a_dataset_without_rows_has_no_bytes_per_sample(tmp_path, make_latent_dataset, capsys):
    make_latent_dataset(tmp_path, [0], num_tokens=5, dim=8)
    assert status_of("info", tmp_path, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    for column in document["columns"].values():
        assert column["bytes_per_sample"] is None
        assert column["bytes_per_sample_by_component"] == {}


# All commands -------------------------------------------------------------------------------------


def arguments(command: str, dataset: Path, tmp_path: Path) -> list[object]:
    return [command, dataset, *([tmp_path / "out"] if command == "export" else [])]


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_document_on_stdout_and_nothing_else(small, tmp_path, capsys, command):
    assert status_of(*arguments(command, small, tmp_path), "--json") == 0
    captured = capsys.readouterr()
    assert isinstance(json.loads(captured.out), dict)
    assert captured.out.count("\n") == 1
    assert captured.err == ""


@pytest.mark.parametrize("flags", [[], ["--full"], ["--decode", "2"]], ids=str)
def test_json_of_verify_is_one_document_also_where_something_is_wrong(stored, capsys, flags):
    assert status_of("verify", stored.path, "--json", *flags) in (0, 1)
    document = json.loads(capsys.readouterr().out)
    assert document.keys() == {"dataset", "problems", "decoded"}
    assert len(document["decoded"]) == (6 if "--decode" in flags else 0)


def test_json_of_a_damaged_dataset_lists_the_problems(small, capsys):
    (path,) = small.glob("moments-32-*/00001.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert status_of("verify", small, "--json") == 1
    document = json.loads(capsys.readouterr().out)
    (problem,) = document["problems"]
    assert problem.startswith(f"{path}: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_names_its_options_and_explains_each(capsys, command):
    assert status_of(command, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    (commands,) = [a for a in build_parser()._actions if a.dest == "command"]
    assert commands.choices is not None
    for action in commands.choices[command]._actions:  # type: ignore[call-overload]
        for option in action.option_strings:
            assert option in text
        assert action.help, f"{command} {action.dest}: no help"
    assert "folder or a URL" in text


def test_the_general_help_names_every_command_and_its_exit_status(capsys):
    assert status_of("--help") == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert re.search(rf"^ *{command} |python -m shards {command}", text, re.MULTILINE)
    assert "Exit status" in text


@pytest.mark.parametrize("argv", [[], ["inspect"], ["info"], ["export", "a"], ["gc", "a", "--all"]])
def test_a_wrong_command_line_has_status_two(capsys, argv):
    assert status_of(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: python -m shards" in captured.err


@pytest.mark.parametrize("place", [0, 1], ids=["dataset", "out"])
def test_a_url_of_an_unknown_protocol_is_one_line(small, capsys, place):
    places = [str(small), str(small.parent / "out")]
    places[place] = "gopher://there/latents"
    assert status_of("export", *places) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "gopher://there/latents: cannot be reached" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_manifest_is_one_line_or_no_matter(small, tmp_path, capsys, command):
    (small / "dataset.json").write_text('{"format_version": 1, "columns": []}')
    status = status_of(*arguments(command, small, tmp_path))
    captured = capsys.readouterr()
    assert status == {"info": 2, "export": 2, "verify": 1}.get(command, 0)
    if status == 2:
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert "python -m shards index" in captured.err


def test_the_interpreter_runs_every_command_quietly_and_without_torch(small, tmp_path):
    """In the shell, with real streams: one process for all of them."""
    code = (
        "import sys\n"
        "from shards.__main__ import main\n"
        "for argv in eval(sys.argv[1]):\n"
        "    try:\n"
        "        main(argv)\n"
        "    except SystemExit as ended:\n"
        "        assert not ended.code, argv\n"
        "    foreign = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "    assert argv[0] == 'export' or not foreign, argv"  # webdataset imports torch
    )
    names = sorted(COMMANDS, key=lambda name: name == "export")
    argvs = [list(map(str, arguments(name, small, tmp_path))) for name in names]
    done = run_python("-c", code, argvs)
    assert done.stderr == ""
    assert done.returncode == 0
