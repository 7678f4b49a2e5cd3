"""A sweep to its end, whatever happens to it and to its trials, mostly with a stand-in trainer."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, build_latent_dataset
from helpers_train import error_line, flags, write_unet

from shards.errors import StorageError, UserError
from shards.lock import sole_writer
from train.sweep.__main__ import main
from train.sweep.config import SweepConfig
from train.sweep.runner import sweep
from train.sweep.study import Study

WAIT_SEC = 60
# Trains nothing. Its loss is least at a learning rate of 1e-3; --seed says how it ends.
FAKE_TRAINER = """
import json, math, os, signal, sys, time
from pathlib import Path

FINE, CRASHES, NOT_FINITE, DIES, GIVES_UP, ENDS_EARLY = range(6)
words = sys.argv[1:]
flag = lambda name, default="": words[words.index(name) + 1] if name in words else default
run, last = Path(flag("--output-dir")), int(flag("--max-steps"))
every = int(flag("--validation-every"))
rate, seed = float(flag("--learning-rate", "1e-3")), int(flag("--seed", "0"))
state, metrics = run / "state", run / "metrics.jsonl"
step = int(state.read_text()) if state.exists() else 0
rows = metrics.read_text().splitlines(True) if metrics.exists() else []
metrics.write_text("".join(row for row in rows if json.loads(row)["step"] <= step))
environment = [os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES")]
with open(run / "starts.jsonl", "a") as file:
    file.write(json.dumps({"step": step, "pid": os.getpid(), "env": environment}) + "\\n")

def save():
    state.with_suffix(".tmp").write_text(str(step))
    state.with_suffix(".tmp").replace(state)

stops = []  # as the trainer does: the step in progress ends first
signal.signal(signal.SIGTERM, lambda *_: stops.append(True))
live = run.parent / "live"
live.mkdir(exist_ok=True)
(live / str(os.getpid())).touch()
meet = int(flag("--sample-steps", "0"))  # wait for so many at a time; write down how many there are
deadline = time.monotonic() + 20
while meet and len(os.listdir(live)) < meet and time.monotonic() < deadline:
    time.sleep(0.01)
(run / "seen").write_text(str(len(os.listdir(live))))
if meet:
    time.sleep(0.5)
if seed == CRASHES:
    sys.stderr.write("Traceback: so\\ntrain: error: the dog ate it. Remedy: another dog\\nbye\\n")
    sys.exit(2)
if seed == GIVES_UP:
    print("ValueError: no idea")
    sys.exit(1)
if seed == ENDS_EARLY:
    sys.exit(0)
while step < last:
    step += 1
    if step % every == 0 or step == last:
        loss = abs(math.log10(rate) + 3) + 0.5 * (1 - step / last) + 0.1
        if seed == NOT_FINITE and step > last / 2:
            loss = None
        row = {"step": step, "val/loss": loss, "val/ema_loss": loss and loss + 1}
        with metrics.open("a") as file:
            file.write(json.dumps(row) + "\\n")
        save()
        if seed == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        gate = run.parent / f"gate-{run.name}"
        while gate.exists() and step < last and not stops:
            (run / "waits").touch()
            time.sleep(0.01)
        done = run.parent.glob("trial-*/done")
        if rate > 0.05 and step > every and len(list(done)) >= 3:  # it will be stopped for its loss
            while time.monotonic() < deadline and not stops:
                time.sleep(0.01)
    if stops:
        save()
        sys.exit(0)
save()
(run / "done").touch()
(live / str(os.getpid())).unlink()
"""


@pytest.fixture(autouse=True)
def _on_the_cpu_and_without_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr("train.sweep.runner._POLL_SEC", 0.02)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sweep") / "latents"
    return str(build_latent_dataset(path, [60], dim=32, num_tokens=5).path)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The stand-in, in whose sweeps no plot is drawn: that takes longer than they do."""
    monkeypatch.setattr("train.sweep.report.write_plot", lambda *_: None)
    path = tmp_path / "fake_trainer.py"
    path.write_text(FAKE_TRAINER)
    return (str(path),)


@pytest.fixture
def passed(tmp_path: Path) -> list[str]:
    return flags(unet=write_unet(tmp_path / "unet.json"))


@pytest.fixture
def config(data: str, tmp_path: Path) -> Callable[..., SweepConfig]:
    return lambda **changes: SweepConfig(**(settings_of(data, tmp_path) | changes))


def settings_of(data: str, folder: Path) -> dict[str, Any]:
    return {
        "data": data,
        "preset": "tiny",
        "max_steps": 20,
        "out": str(folder / "sweep"),
        "search": ("learning_rate=1e-5:1e-1:log",),
        "pruner": "none",
    }


def report_of(config: SweepConfig) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((Path(config.out) / "sweep.json").read_text())
    return document


def states_of(config: SweepConfig) -> list[str]:
    return [trial["state"] for trial in report_of(config)["trials"]]


def starts_of(config: SweepConfig, trial: int) -> list[dict[str, Any]]:
    lines = (Path(config.out) / f"trial-{trial:04d}" / "starts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_sweep_runs_each_trial_once_and_says_which_was_best(config, passed, fake, capsys):
    asked = config(trials=4)
    sweep(asked, passed, fake)
    report = report_of(asked)
    assert states_of(asked) == ["complete"] * 4
    assert [len(starts_of(asked, trial)) for trial in range(4)] == [1] * 4
    rates = [trial["settings"]["learning_rate"] for trial in report["trials"]]
    assert len(set(rates)) == 4
    losses = [trial["loss"] for trial in report["trials"]]
    assert report["best"]["trial"] == losses.index(min(losses))
    assert f"--learning-rate {rates[losses.index(min(losses))]}" in report["best"]["command"]
    assert report["trials"][0]["val_ema_loss"] == pytest.approx(losses[0] + 1)
    assert all(len(trial["losses"]) == 5 for trial in report["trials"])
    with (Path(asked.out) / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["learning_rate"]) for row in rows] == rates
    assert "(4/4)" in capsys.readouterr().out


def test_the_same_command_again_runs_nothing_and_more_trials_add_to_it(config, passed, fake):
    sweep(config(trials=2), passed, fake)
    first = report_of(config())["trials"]
    sweep(config(trials=2), passed, fake)
    assert report_of(config())["trials"] == first
    sweep(config(trials=3), passed, fake)
    assert states_of(config()) == ["complete"] * 3
    for before, now in zip(first, report_of(config())["trials"], strict=False):
        assert now | {"pareto": before["pareto"]} == before
    assert [len(starts_of(config(), trial)) for trial in range(3)] == [1] * 3


# Killed and continued -----------------------------------------------------------------------------


def start_sweep(
    asked: SweepConfig, passed: Sequence[str], fake: Sequence[str]
) -> subprocess.Popen[str]:
    code = (
        "import json, sys\n"
        "from shards.errors import reported\n"
        "from train.sweep.config import SweepConfig\n"
        "from train.sweep.runner import sweep\n"
        "settings, passed, trainer = json.loads(sys.argv[1])\n"
        "with reported('sweep'):\n"
        "    sweep(SweepConfig(**settings), passed, trainer)\n"
    )
    arguments = json.dumps([asdict(asked), list(passed), list(fake)])
    return subprocess.Popen(
        [sys.executable, "-c", code, arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SEC
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def settings_and_losses(asked: SweepConfig) -> list[Any]:
    return [(trial["settings"], trial["losses"]) for trial in report_of(asked)["trials"]]


@pytest.fixture(scope="module")
def undisturbed(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Settings and losses of four trials that nobody kills, one after another."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "fake_trainer.py").write_text(FAKE_TRAINER)
    asked = SweepConfig(**settings_of(data, folder), trials=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "1")
        sweep(
            asked, flags(unet=write_unet(folder / "unet.json")), (str(folder / "fake_trainer.py"),)
        )
    return settings_and_losses(asked)


@pytest.mark.parametrize("way", ["ctrl-c", "sweep", "children, sweep"])
def test_a_sweep_that_is_killed_goes_on_and_loses_no_trial(way, config, passed, fake, undisturbed):
    asked = config(trials=4, workers=2)
    out = Path(asked.out)
    out.mkdir()
    gates = [out / f"gate-trial-{number:04d}" for number in (1, 2)]
    for gate in gates:
        gate.touch()
    process = start_sweep(asked, passed, fake)
    try:
        waits = [out / f"trial-{number:04d}" / "waits" for number in (1, 2)]
        wait_for(lambda: all(wait.exists() for wait in waits), "two trials")
        pids = [starts_of(asked, number)[0]["pid"] for number in (1, 2)]
        for victim in way.split(", "):
            if victim == "ctrl-c":
                process.send_signal(signal.SIGINT)
            elif victim == "sweep":
                process.kill()
            else:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
        said, _ = process.communicate(timeout=WAIT_SEC)
        wait_for(lambda: not any(map(is_alive, pids)), "the children to end with their sweep")
    finally:
        process.kill()
    if way == "ctrl-c":
        assert process.returncode == 0, said
        assert "the same command continues" in said
        assert states_of(asked) == ["complete"] + ["under way"] * 2
    for gate in gates:
        gate.unlink()
    sweep(asked, passed, fake)
    assert states_of(asked) == ["complete"] * 4
    assert sorted(path.name for path in out.glob("trial-*")) == [f"trial-000{n}" for n in range(4)]
    steps = [[start["step"] for start in starts_of(asked, number)] for number in range(4)]
    assert steps[0] == steps[3] == [0]
    for of_trial in steps[1:3]:
        assert of_trial[0] == 0
        assert of_trial[1:]
        assert all(step >= 4 for step in of_trial[1:]), "it began again"
    assert settings_and_losses(asked) == undisturbed


def test_a_trial_that_was_asked_for_but_never_started_is_not_lost(config, passed, fake):
    import optuna

    asked = config(trials=3)
    sweep(config(trials=1), passed, fake)
    storage = f"sqlite:///{asked.out}/study.sqlite"
    optuna.load_study(study_name="sweep", storage=storage).ask()  # and killed: it has no settings
    sweep(asked, passed, fake)
    assert states_of(asked) == ["complete"] * 3


def test_a_trial_that_was_to_be_pruned_when_the_sweep_died_is_pruned(config, passed, fake):
    import optuna

    asked = config(trials=2)
    sweep(config(trials=1), passed, fake)
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{asked.out}/study.sqlite")
    study.ask().set_user_attr("pruned_at", 8)
    sweep(asked, passed, fake)
    assert states_of(asked) == ["complete", "pruned"]
    assert not (Path(asked.out) / "trial-0001").exists()


# What may become of a trial -----------------------------------------------------------------------


def test_a_trial_that_fails_says_why_and_the_others_go_on(config, passed, fake):
    ends = {  # by --seed: the reason, and how often it was started
        0: ("", 1),
        1: ("exit status 2: train: error: the dog ate it. Remedy: another dog", 1),
        2: ("the validation loss is not finite at step 12", 1),
        3: ("killed by SIGKILL, 3 times", 3),
        4: ("exit status 1: ValueError: no idea", 1),
        5: ("it ended 3 times before its last step", 3),
    }
    asked = config(trials=9, search=("seed=0,1,2,3,4,5",))
    sweep(asked, passed, fake)
    trials = report_of(asked)["trials"]
    assert {trial["settings"]["seed"] for trial in trials} == set(ends)
    for trial in trials:
        reason, num_starts = ends[trial["settings"]["seed"]]
        assert trial["state"] == ("failed" if reason else "complete")
        assert trial["reason"].startswith(reason)
        assert bool(trial["reason"]) == bool(reason)
        assert len(starts_of(asked, trial["trial"])) == num_starts


def test_a_sweep_of_failures_ends_with_the_reason_of_one(config, passed, fake, capsys):
    with pytest.raises(UserError, match=r"no trial was complete; exit status 2: .* the dog ate it"):
        sweep(config(trials=2), [*passed, "--seed", "1"], fake)
    assert states_of(config()) == ["failed"] * 2


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_pruning_stops_the_child(pruner, config, passed, fake):
    # This seed draws good ones first: there must be something to be worse than.
    search = ("learning_rate=1e-3,0.9e-3,0.5,0.9",)
    asked = config(trials=6, pruner=pruner, sampler_seed=6, search=search)
    sweep(asked, passed, fake)
    pruned = [trial for trial in report_of(asked)["trials"] if trial["state"] == "pruned"]
    assert any(trial["settings"]["learning_rate"] > 0.05 for trial in pruned)
    for trial in pruned:
        run = Path(asked.out) / f"trial-{trial['trial']:04d}"
        assert int((run / "state").read_text()) < 20
        assert not (run / "done").exists()
        assert not is_alive(starts_of(asked, trial["trial"])[0]["pid"])
        assert trial["trial"] not in report_of(asked)["pareto"]
        assert len(trial["losses"]) < 5
    complete = [trial for trial in report_of(asked)["trials"] if trial["state"] == "complete"]
    assert all(len(trial["losses"]) == 5 for trial in complete)
    best = report_of(asked)["best"]["trial"]
    assert report_of(asked)["trials"][best]["settings"]["learning_rate"] < 0.01


def test_a_bad_trial_that_ends_before_it_is_looked_at_is_complete(
    config, passed, fake, monkeypatch
):
    monkeypatch.setattr("train.sweep.runner._POLL_SEC", 0.5)
    asked = config(trials=5, pruner="median", search=("learning_rate=1e-3,1e-2",))
    sweep(asked, passed, fake)
    for trial in report_of(asked)["trials"]:
        expected = 0.1 if trial["settings"]["learning_rate"] == 1e-3 else 1.1
        assert trial["state"] == "pruned" or list(trial["losses"]) == ["1", "2", "3", "4", "5"]
        assert trial["state"] == "pruned" or trial["loss"] == pytest.approx(expected)


def test_workers_run_at_the_same_time_and_no_more_than_that_many(config, passed, fake, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = config(trials=4, workers=2)
    sweep(asked, [*passed, "--sample-steps", "2"], fake)
    seen = [int(path.read_text()) for path in Path(asked.out).glob("trial-*/seen")]
    assert len(seen) == 4
    assert max(seen) == 2


# Refused ------------------------------------------------------------------------------------------


def test_a_folder_may_have_any_name(config, passed, fake, tmp_path):
    out = tmp_path / "a ü?b=1#c%41{x}"
    for trials in (1, 2):
        sweep(config(out=str(out), trials=trials), passed, fake)
    assert (out / "study.sqlite").is_file()
    assert not (tmp_path / "a ü").exists()
    assert len(states_of(config(out=str(out)))) == 2


def test_a_full_disk_under_the_study_is_one_line_and_the_sweep_goes_on_later(
    config, passed, fake, monkeypatch
):
    def fill(self: Study, trial: Any, loss: float) -> None:
        connection = self._storage.engine.raw_connection()
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        connection.close()
        for number in range(1000):
            trial.set_user_attr(f"filler {number}", "x" * 1000)

    with monkeypatch.context() as patch:
        patch.setattr(Study, "complete", fill)
        with pytest.raises(StorageError, match=r"study\.sqlite: cannot be written \(.* full\)"):
            sweep(config(trials=1), passed, fake)
    sweep(config(trials=1), passed, fake)
    assert states_of(config(trials=1)) == ["complete"]


def test_a_study_of_other_settings_is_refused(config, passed, fake):
    sweep(config(trials=1), passed, fake)
    for changes, more, named in (
        ({"max_steps": 30}, [], "max_steps 20 -> 30"),
        ({"search": ("learning_rate=1e-5:1e-2:log",)}, [], "search"),
        ({"compare": "steps"}, [], "compare samples -> steps"),
        ({}, ["--weight-decay", "0.5"], "--weight-decay 0.5"),
        ({}, ["--validation-samples", "1"], "held_out"),
    ):
        with pytest.raises(UserError, match="belongs to another sweep") as refused:
            sweep(config(trials=1, **changes), [*passed, *more], fake)
        assert named in str(refused.value)
    assert len(starts_of(config(), 0)) == 1


def test_runs_without_a_study_are_not_taken_over(config, passed, fake):
    (Path(config().out) / "trial-0000").mkdir(parents=True)
    with pytest.raises(UserError, match=r"runs of trials, and no study\.sqlite"):
        sweep(config(), passed, fake)


def test_a_file_that_is_no_study_is_refused(config, passed, fake):
    Path(config().out).mkdir()
    (Path(config().out) / "study.sqlite").write_bytes(b"This is a diary." * 100)
    with pytest.raises(UserError, match="cannot be used as a study"):
        sweep(config(), passed, fake)


def test_a_second_sweep_at_the_same_time_is_refused(config, passed, fake):
    with sole_writer(Path(config().out)), pytest.raises(UserError, match="another process is"):
        sweep(config(), passed, fake)


def test_data_without_held_out_samples_is_refused(config, passed, fake, tmp_path):
    small = build_latent_dataset(tmp_path / "small", [19], dim=32, num_tokens=5).path
    with pytest.raises(UserError, match="no held-out samples"):
        sweep(config(data=str(small)), passed, fake)
    with pytest.raises(UserError, match="no held-out samples"):
        sweep(config(), [*passed, "--validation-samples", "0"], fake)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--output-dir", "x"], "--out"),
        (["--validation-every", "5"], "--validations"),
        (["--follow"], "--follow"),
        (["--online", "x.tar"], "--online"),
    ],
)
def test_flags_that_would_spoil_the_comparison_are_refused(more, named, config, passed, fake):
    with pytest.raises(UserError, match=named):
        sweep(config(), [*passed, *more], fake)
    assert not Path(config().out).exists()


def test_a_batch_that_the_data_cannot_fill_is_refused_before_anything_starts(config, passed, fake):
    with pytest.raises(UserError, match="64 takes at least 64 samples, the dataset has 57"):
        sweep(config(search=("global_batch_size=32,64",)), passed, fake)
    assert not Path(config().out).exists()


def test_dollars_need_a_gpu(config, passed, fake):
    with pytest.raises(UserError, match="no GPU"):
        sweep(config(usd_per_gpu_hour=(3.0,)), passed, fake)


def test_without_optuna_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    line = error_line(capsys, lambda: main(["--data", "nowhere"]))
    assert "Optuna is not installed" in line
    assert ".venv/bin/pip install optuna" in line


# The trainer itself -------------------------------------------------------------------------------


def test_the_trainer_itself_is_swept(data, tmp_path, passed):
    out = tmp_path / "real"
    own = ["--data", data, "--preset", "tiny", "--trials", "1", "--max-steps", "4", "--out", out]
    more = ["--validations", "2", "--search", "learning_rate=1e-4:1e-2:log", *passed]
    main([*map(str, own), *more, "--global-batch-size", "4", "--warmup-steps", "0"])
    report = json.loads((out / "sweep.json").read_text())
    (trial,) = report["trials"]
    assert trial["state"] == "complete", trial["reason"]
    assert list(trial["losses"]) == ["1", "2"]
    assert trial["loss"] == min(trial["val_loss"], trial["val_ema_loss"])
    assert (trial["steps"], trial["samples"]) == (4, 16)
    assert trial["device_hours"] > 0
    assert "--global-batch-size 4" in report["best"]["command"]
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
