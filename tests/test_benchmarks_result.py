"""Results: one form, a name that says what and where, and nothing read that is none."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import result as result_module
from benchmarks.result import (
    RESULTS,
    environment,
    hardware_name,
    output_file,
    publish,
    read_result,
    result,
    result_path,
    spread,
)
from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    num_samples: int = 3
    out: str = ""


@pytest.fixture
def document() -> dict[str, Any]:
    return result("loader", Settings(), samples=[1.0, 2.0], speed=spread([1.0, 2.0]))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(result_module, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("device", "count", "on_gpu", "name"),
    [
        ("NVIDIA H200", 1, True, "h200"),
        ("NVIDIA A100-SXM4-80GB", 8, True, "8xa100-sxm4-80gb"),
        ("NVIDIA GeForce RTX 4090", 2, True, "2xrtx-4090"),
        ("AMD EPYC", 2, False, "epyc-2cpu"),
        ("AMD EPYC 7R13 48-Core Processor", 96, False, "epyc-7r13-96cpu"),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", 4, False, "xeon-platinum-8375c-4cpu"),
        ("../../etc/passwd", 1, False, "..-..-etc-passwd-1cpu"),
        ("", 1, False, "unknown-1cpu"),
    ],
)
def test_hardware_has_a_name_that_a_file_can_have(device, count, on_gpu, name):
    found = hardware_name(device, count, on_gpu=on_gpu)
    assert found == name
    assert "/" not in found


def test_a_result_says_what_ran_where_and_when(document):
    assert document["format"] == 1
    assert document["protocol"] == {"num_samples": 3, "out": ""}
    env = document["environment"]
    assert env["hardware"] in result_path(document).name
    assert env["command"].startswith("python -m benchmarks")
    assert env["versions"]["torch"]
    assert env["num_cpus"] >= 1
    assert isinstance(env["dirty"], bool)
    json.dumps(document, allow_nan=False)


def test_it_is_written_under_theme_hardware_and_month_and_is_the_last_line(
    document, results, capsys
):
    publish(document, "")
    year, month, _ = document["environment"]["date"].split("-")
    path = results / f"loader_{document['environment']['hardware']}_{year}{month}.json"
    assert read_result(path) == document
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == document


def test_another_preset_is_another_file_and_what_is_replaced_is_said(results, capsys):
    names = []
    for preset in ("tiny", "sd2-base-256"):
        document = result("online-offline", Settings(), variant=preset)
        publish(document, "")
        names.append(result_path(document).name)
    assert len(set(names)) == 2
    assert names[1].startswith("online-offline-sd2-base-256_")
    assert "in place of" not in capsys.readouterr().out
    publish(document, "")
    assert f"in place of the result of {document['environment']['date']}" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["", "folder", "device", "link-to-folder", "loop"])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, out):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link-to-folder").symlink_to(tmp_path / "folder")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "device")
    with pytest.raises(UserError, match="--out"):
        output_file(str(tmp_path / out) if out else "")


def test_a_link_is_followed_and_stays_a_link(document, tmp_path, capsys):
    target, link = tmp_path / "real.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    publish(document, str(link))
    assert link.is_symlink()
    assert read_result(target) == document


def test_a_result_that_cannot_be_written_is_printed_all_the_same(document, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError):
        publish(document, str(tmp_path / "file" / "r.json"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == document


def test_figures_that_are_no_numbers_are_never_published(results, capsys):
    with pytest.raises(ValueError, match="JSON"):
        publish(result("loader", Settings(), speed=float("nan")), "-")


def test_it_can_be_written_elsewhere_or_nowhere(document, results, tmp_path, capsys):
    publish(document, str(tmp_path / "x" / "mine.json"))
    assert read_result(tmp_path / "x" / "mine.json") == document
    publish(document, "-")
    assert not results.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == document


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "cannot be read"),
        ('{"theme": ', "cannot be read"),
        ("\xff\xfe", "cannot be read"),
        ("[1, 2]", "is no benchmark's result"),
        ('{"theme": "loader"}', "is no benchmark's result"),
        ("[" * 100_000, "cannot be read"),
        ('{"theme": "x", "variant": "", "protocol": {}, "environment": {}}', "format None"),
        (
            '{"format": 2, "theme": "x", "variant": "", "protocol": {}, "environment": {}}',
            "format 2",
        ),
    ],
)
def test_what_is_no_result_of_this_format_is_refused_by_name(tmp_path, text, found):
    path = tmp_path / "r.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=found) as failure:
        read_result(path)
    assert str(path) in str(failure.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_result(tmp_path / "none.json")


def test_results_themselves_make_no_tree_dirty(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True)

    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (tmp_path / "code.py").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(result_module, "__file__", str(tmp_path / "benchmarks" / "result.py"))
    assert environment()["dirty"] is False
    (folder / "a.json").write_text('{"new": 1}')
    assert environment()["dirty"] is False
    (tmp_path / "code.py").write_text("changed")
    assert environment()["dirty"] is True


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_what_is_committed_can_be_read_and_bears_its_name(path):
    document = read_result(path)
    assert result_path(document).name == path.name
    assert document["environment"]["commit"] != "unknown"


def test_spread_is_the_median_between_two_percentiles():
    assert spread([3.0, 1.0, 2.0]) == pytest.approx({"median": 2.0, "p10": 1.2, "p90": 2.8})
