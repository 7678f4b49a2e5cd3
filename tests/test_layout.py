"""The house: names that shadow nothing, arrows that run one way, commands that answer at once."""

import shutil
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_python

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: list[str] = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
HEAVY = ["torch", "diffusers", "transformers", "accelerate", "webdataset", "matplotlib"]


def modules_of(package: str) -> list[Path]:
    """Modules and packages right below it."""
    folder = REPOSITORY / package
    return sorted([*folder.glob("*.py"), *(path.parent for path in folder.glob("*/__init__.py"))])


def strangers() -> set[str]:
    """Import names of other people's distributions, and of the standard library."""
    ours = PROJECT["project"]["name"]
    installed = {name for name, of in packages_distributions().items() if set(of) != {ours}}
    return set(sys.stdlib_module_names) | installed


def test_every_package_is_there_with_modules_in_it():
    wanted = {
        "shards",
        "precompute",
        "train",
        "evaluate",
        "serve",
        "benchmarks",
        "examples",
        "deploy",
    }
    assert wanted <= set(PACKAGES)
    assert all(len(modules_of(package)) > 1 for package in PACKAGES)
    assert {"torch", "PIL", "numpy", "logging"} <= strangers()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_shadows_a_stranger(package):
    """In script mode a module's folder comes first on the path: `train/queue.py` breaks torch."""
    own = {"__init__", "__main__"}
    taken = (strangers() | set(PACKAGES)) - own
    clashes = [str(path) for path in modules_of(package) if path.stem in taken]
    assert not clashes


def test_no_package_shadows_the_standard_library():
    assert not set(PACKAGES) & set(sys.stdlib_module_names)


def test_the_distribution_is_not_named_like_what_it_installs():
    """`pip install train` gets a stranger's library: no message may suggest it."""
    assert PROJECT["project"]["name"] not in PACKAGES
    assert "Private :: Do Not Upload" in distribution(PROJECT["project"]["name"]).metadata.get_all(
        "Classifier", []
    )


def test_tests_lie_flat_and_are_named_after_what_they_test():
    folder = REPOSITORY / "tests"
    assert not list(folder.glob("[a-z]*/"))  # tools keep caches there under other names
    for path in folder.glob("test_*.py"):
        assert path.stem == "test_layout" or path.stem.split("_")[1] in PACKAGES, path.name


def test_arrows_between_packages_run_one_way(tmp_path):
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    config = tmp_path / "pyproject.toml"
    done = run_python("-c", code, "--no-cache", "--config", config, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stdout
    count = len(PROJECT["tool"]["importlinter"]["contracts"])
    assert f"{count} kept, 0 broken" in done.stdout


COMMANDS = [
    ("-m", "precompute"),
    ("train/main.py",),
    ("-m", "shards"),
    ("-m", "shards", "verify"),
    ("-m", "evaluate"),
    ("-m", "evaluate", "sample"),
    ("-m", "evaluate", "guidance"),
    ("-m", "serve"),
    ("-m", "serve", "run"),
    ("-m", "serve", "up"),
    ("-m", "train.sweep"),
    ("-m", "benchmarks"),
    ("-m", "benchmarks", "loader"),
    ("-m", "benchmarks", "latency"),
    ("-m", "benchmarks", "load"),
    ("-m", "examples.demo"),
    ("-m", "examples.scenes"),
]


def imported_by(*command: str) -> set[str]:
    """Names of all modules that a command which succeeds has imported."""
    done = run_python("-X", "importtime", *command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage:" in done.stdout
    assert "--help" in done.stdout
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_answers_without_loading_a_heavy_library(command):
    imported = imported_by(*command, "--help")
    assert "argparse" in imported
    assert not imported & set(HEAVY)


@pytest.mark.parametrize("package", ["shards", "precompute.job", "train.config", "train.main"])
def test_what_starts_a_command_is_imported_without_a_heavy_library(package):
    code = (
        f"import sys, {package}; assert not set({HEAVY!r}) & set(sys.modules), sys.modules.keys()"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr[-500:]
