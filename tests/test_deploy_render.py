"""Manifests are filled in whole or not at all."""

from pathlib import Path

import pytest
from conftest import REPOSITORY
from helpers_train import error_line

from deploy.render import main, parse_values, render
from shards.errors import UserError


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text('# of ${COMMENT}\nname: ${NAME:-job}\nimage: "${IMAGE}"\nagain: ${NAME:-job}\n')
    return path


def test_values_win_over_defaults_and_comments_are_dropped(manifest: Path) -> None:
    assert render(manifest, {"IMAGE": "x:1"}) == 'name: job\nimage: "x:1"\nagain: job\n'
    assert render(manifest, {"IMAGE": "x", "NAME": "mine"}).count("mine") == 2


def test_a_missing_value_is_named_with_the_command_that_gives_it(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, lambda: main([str(manifest), "NAME=x"]))
    assert "no value for IMAGE" in line
    assert f"python -m deploy.render {manifest} IMAGE=..." in line


def test_an_empty_value_is_a_missing_one(manifest: Path) -> None:
    with pytest.raises(UserError, match="no value for IMAGE"):
        render(manifest, {"IMAGE": ""})


def test_a_value_that_nothing_asks_for_is_refused_with_the_nearest_name(manifest: Path) -> None:
    with pytest.raises(UserError, match=r"no place for IMAEG.*Remedy: IMAGE="):
        render(manifest, {"IMAEG": "x"})


@pytest.mark.parametrize("value", ['a"b', "a\nb", "a\\b", "$(rm)", "`rm`"])
def test_a_value_cannot_break_out_of_its_quotes(value: str) -> None:
    with pytest.raises(UserError, match=r"IMAGE: .* in its value"):
        parse_values([f"IMAGE={value}"])


def test_a_value_may_hold_braces_and_equal_signs() -> None:
    values = parse_values(["SHARDS=s3://b/{000..999}.tar", "FILTER=a == b"])
    assert values == {"SHARDS": "s3://b/{000..999}.tar", "FILTER": "a == b"}


@pytest.mark.parametrize("pairs", [["IMAGE"], ["IMAGE=a", "IMAGE=b"]])
def test_a_value_is_given_once_and_with_its_name(pairs: list[str]) -> None:
    with pytest.raises(UserError, match="IMAGE"):
        parse_values(pairs)


def test_no_manifest_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml"):
        render(tmp_path / "nothing.yaml", {})


def test_what_is_no_text_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match=r"x\.yaml: not UTF-8; wanted a manifest"):
        render(tmp_path / "x.yaml", {})


def test_no_file_of_deploy_has_a_hole_that_the_renderer_does_not_see() -> None:
    """The published launch files had `{TAG}`, and ids of other people's accounts."""
    files = [path for path in (REPOSITORY / "deploy").rglob("*.yaml") if path.is_file()]
    assert len(files) >= 7
    for path in files:
        text = render(path, _needed(path))
        assert "${" not in text, path
        assert "{TAG}" not in text, path
        assert not any(
            len(word) == 12 and word.isdigit() for word in text.replace(":", " ").split()
        )


def _needed(path: Path) -> dict[str, str]:
    from deploy.render import holes

    found = holes(path.read_text())
    return {name: "x" for name, default in found.items() if default is None}
