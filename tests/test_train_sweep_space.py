"""What is searched, what trials cost and have in common: no trial runs here."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from helpers_train import error_line

from shards.errors import UserError
from train.config import TrainConfig
from train.main import parse
from train.presets import PRESETS
from train.sweep.__main__ import main
from train.sweep.config import SweepConfig
from train.sweep.devices import deal_out
from train.sweep.outcome import Outcome, best_of, front_of
from train.sweep.pareto import pareto_front
from train.sweep.plan import Plan
from train.sweep.report import table
from train.sweep.space import (
    NOT_SEARCHABLE,
    default_search,
    ends,
    flag_names,
    flags_of,
    parse_space,
    value_of,
)

TINY = PRESETS["tiny"]


def space_of(*words: str, fixed: tuple[str, ...] = ()) -> dict[str, Any]:
    return parse_space(words, TINY, fixed, 200)


# What is searched ---------------------------------------------------------------------------------


def test_ranges_and_choices_are_read_as_the_settings_types():
    space = space_of(
        "learning_rate=1e-5:1e-2:log",
        "global-batch-size=16,32,64",
        "warmup_steps=0:50",
        "ema_decay=0.99:0.9999",
        "lr_schedule=constant,cosine",
        "adam_betas=0.9/0.99,0.9/0.999",
        "low_precision_norm=true,false",
        "micro_batch_size=auto,16",
    )
    assert (space["learning_rate"].low, space["learning_rate"].high) == (1e-5, 1e-2)
    assert space["learning_rate"].log
    assert not space["ema_decay"].log
    assert ends("global_batch_size", space["global_batch_size"]) == [16, 32, 64]
    assert type(space["warmup_steps"].high) is int
    assert ends("adam_betas", space["adam_betas"]) == [(0.9, 0.99), (0.9, 0.999)]
    assert ends("low_precision_norm", space["low_precision_norm"]) == [True, False]
    assert ends("micro_batch_size", space["micro_batch_size"]) == ["auto", 16]


def test_without_a_search_the_usual_ranges_are_taken_but_for_what_is_fixed():
    assert set(space_of()) == set(default_search(TINY, 200))
    assert set(space_of(fixed=("learning_rate",))) == set(space_of()) - {"learning_rate"}
    assert list(space_of("warmup_steps")) == ["warmup_steps"]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("max_steps", [1, 7, 200, 55_000])
def test_the_usual_ranges_of_every_preset_are_allowed(name, max_steps):
    preset = PRESETS[name]
    space = parse_space([], preset, [], max_steps)
    low, high = ends("learning_rate", space["learning_rate"])
    assert low < preset.learning_rate < high
    assert preset.global_batch_size in ends("global_batch_size", space["global_batch_size"])


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("learning_rat=1e-5:1e-2", "no setting 'learning_rat'.*--search learning_rate="),
        ("frobnicate=1,2", "no setting 'frobnicate'"),
        ("learning_rate=1e-2:1e-5", "is not below"),
        ("learning_rate=1e-2:1e-2", "is not below"),
        ("learning_rate=0:1:log", "no logarithm"),
        ("learning_rate=0:inf", "wanted a number"),
        ("learning_rate=nan,1", "wanted a number"),
        ("learning_rate=1:2:log2", "LOW:HIGH:log"),
        ("learning_rate=1:2:3:4", "LOW:HIGH:log"),
        ("learning_rate=", "wanted a number"),
        ("learning_rate=-1:1", "not allowed: --learning-rate"),
        ("learning_rate=1e-3", "nothing to search"),
        ("learning_rate=1e-3,0.001", "there twice"),
        ("global_batch_size=0:8", "not allowed: --global-batch-size must be at least 1"),
        ("global_batch_size=16.5,32", "wanted a whole number"),
        ("warmup_steps=0:1e3", "wanted a whole number"),
        ("caption_drop_prob=0:1.5", "not allowed: --caption-drop-prob must be between 0 and 1"),
        ("lr_schedule=cosine,linear", "'linear'; wanted one of constant, cosine"),
        ("low_precision_norm=yes,no", "wanted true or false"),
        ("adam_betas=0.9,0.99", "wanted a number/a number"),
        ("adam_betas=0.9/1.5,0.9/0.99", "not allowed: --adam-betas"),
        ("unet", "no range, and this setting has no usual one"),
        ("prediction_type=epsilon,flow", "what the validation loss measures"),
        ("min_snr_gamma=0:5", "what the validation loss measures"),
        ("validation_samples=1,2", "the held-out samples"),
        ("resolution=32,64", "the held-out samples"),
        ("output_dir=a,b", "what the sweep sets"),
        ("weight_decay=0:1", "--weight-decay fixes it"),
    ],
)
def test_a_silly_search_is_refused_with_what_is_wrong(word, named):
    with pytest.raises(UserError, match=named) as refused:
        space_of(word, fixed=("weight_decay",))
    assert str(refused.value).startswith(f"--search {word}: ")


def test_a_setting_is_searched_once():
    with pytest.raises(UserError, match="there twice"):
        space_of("learning_rate=1e-5:1e-2", "learning-rate=1e-5:1e-3")


def test_every_setting_is_searchable_or_says_why_not():
    kinds = get_type_hints(TrainConfig)
    assert kinds.keys() >= NOT_SEARCHABLE.keys()
    texts = {str: "a,b", bool: "true,false", int: "1,2", float: "0.1,0.2"}
    needs_another_setting = {"random_crop", "checkpoint_format"}
    for name in sorted(kinds.keys() - NOT_SEARCHABLE.keys() - needs_another_setting):
        kind = kinds[name]
        if get_origin(kind) is Literal:
            choices = ",".join(get_args(kind)[:2])
        elif get_origin(kind) is tuple:
            choices = "0.9/0.99,0.8/0.99"
        else:
            choices = texts.get(kind, "1,2")
        assert list(space_of(f"{name}={choices}")) == [name]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("learning_rate", "0.00031"),
        ("adam_betas", "0.9/0.95"),
        ("flip_prob", "0.5"),
        ("checkpoint_in_background", "false"),
        ("lr_schedule", "constant"),
        ("micro_batch_size", "auto"),
        ("global_batch_size", "48"),
    ],
)
def test_settings_become_flags_that_the_trainer_reads_as_the_same_settings(name, text):
    value = value_of(name, text)
    words = flags_of({name: value})
    assert getattr(parse(["tiny", *words]), name) == value
    assert flag_names(words) == [name]


def test_lists_from_json_become_the_same_flags_as_tuples():
    assert flags_of({"adam_betas": [0.9, 0.95]}) == flags_of({"adam_betas": (0.9, 0.95)})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--trials", "0"], "--trials: 0; wanted at least 1"),
        (["--validations", "0"], "--validations"),
        (["--workers", "-1"], "--workers"),
        (["--usd-per-gpu-hour", "-3"], "--usd-per-gpu-hour"),
        (["--out", "s3://bucket/x"], "local folder"),
        (["--preset", "tinny"], "'tinny' is unknown"),
        (["--preset", "tiny"], "nowhere"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, named, capsys):
    line = error_line(capsys, lambda: main(["--data", "nowhere", *arguments]))
    assert line.startswith("sweep: error: ")
    assert named in line


def test_help_teaches_the_search_and_loads_nothing_heavy(run_python_code):
    done = run_python_code(
        "import sys\n"
        "from train.sweep.__main__ import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'optuna', 'sqlalchemy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "learning_rate=0.0001:0.01:log" in done.stdout
    assert "--usd-per-gpu-hour" in done.stdout


@pytest.fixture
def run_python_code():
    from conftest import run_python

    return lambda code: run_python("-c", code)


# How long a trial is ------------------------------------------------------------------------------


def plan_of(*search: str, **changes: Any) -> Plan:
    config = SweepConfig(max_steps=200, **changes)
    space = parse_space(search, TINY, [], 200)
    return Plan(config, "tiny", ["--unet", "x"], TINY, space, 200, {})


def test_trials_of_other_batches_see_as_many_samples_and_are_compared_at_equal_shares():
    plan = plan_of("global_batch_size=16,32,64,48")
    for batch in (16, 32, 64, 48):
        length = plan.length_of({"global_batch_size": batch})
        assert length.steps * batch == pytest.approx(200 * 32, abs=batch)
        steps = [*range(length.validation_every, length.steps, length.validation_every)]
        points = [plan.point_of(step, length) for step in (*steps, length.steps)]
        assert points == [1, 2, 3, 4, 5]


def test_trials_of_equal_steps_differ_in_samples():
    plan = plan_of("global_batch_size=16,32", compare="steps")
    assert plan.length_of({"global_batch_size": 16}).steps == 200


def test_a_searched_length_is_taken_as_it_is_and_nothing_is_pruned():
    plan = plan_of("max_steps=50:400", "global_batch_size=16,32")
    assert plan.length_of({"max_steps": 60, "global_batch_size": 16}).steps == 60
    assert not plan.prunes
    whole = parse(plan.full_size_arguments({"max_steps": 60, "global_batch_size": 16}, Path("x")))
    assert whole.max_steps == TINY.max_steps
    assert plan_of("global_batch_size=16,32").prunes


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7, 11])
def test_short_trials_are_measured_at_points_in_order_and_at_their_end(steps):
    plan = plan_of("max_steps=1:400")
    length = plan.length_of({"max_steps": steps})
    measured = [*range(length.validation_every, steps, length.validation_every), steps]
    points = [plan.point_of(step, length) for step in measured]
    assert points == sorted(set(points))
    assert points[-1] == 5


def test_a_trials_arguments_are_read_by_the_trainer(tmp_path):
    plan = plan_of("learning_rate=1e-4:1e-2:log", "global_batch_size=16,32")
    settings = {"learning_rate": 0.00123, "global_batch_size": 16}
    config = parse(plan.trial_arguments(settings, tmp_path))
    assert (config.learning_rate, config.global_batch_size) == (0.00123, 16)
    assert (config.max_steps, config.validation_every, config.checkpoint_every) == (400, 80, 80)
    assert (config.unet, config.num_samples, config.output_dir) == ("x", 0, str(tmp_path))
    whole = parse(plan.full_size_arguments(settings, tmp_path))
    assert whole.max_steps * 16 == TINY.max_steps * 32
    assert whole.learning_rate == 0.00123


# Devices ------------------------------------------------------------------------------------------


def test_gpus_are_dealt_out_without_overlap():
    slots = deal_out([str(number) for number in range(8)], 0, 2)
    dealt = [gpu for slot in slots for gpu in slot.environment["CUDA_VISIBLE_DEVICES"].split(",")]
    assert len(slots) == 4
    assert sorted(dealt) == [str(number) for number in range(8)]


def test_more_trials_at_a_time_than_gpus_are_refused():
    with pytest.raises(UserError, match="--workers 1"):
        deal_out(["0", "1"], 2, 2)
    with pytest.raises(UserError, match="--devices-per-trial 2"):
        deal_out(["0", "1"], 0, 4)


def test_the_threads_of_a_cpu_are_shared_out(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    slots = deal_out([], 3, 1)
    assert [slot.num_threads for slot in slots] == [2, 2, 2]
    assert slots[0].environment["OMP_NUM_THREADS"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in slots[0].environment or not slots[0].gpus
    assert len(deal_out([], 0, 1)) == 1


# Cost against loss --------------------------------------------------------------------------------


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def test_the_pareto_front_is_that_of_brute_force():
    rng = random.Random(0)
    for _ in range(500):
        # Few distinct numbers: ties in one and in both, and twins.
        points = [
            (float(rng.randint(0, 5)), float(rng.randint(0, 5))) for _ in range(rng.randint(0, 12))
        ]
        expected = {
            index
            for index, point in enumerate(points)
            if not any(dominates(other, point) for other in points)
        }
        front = pareto_front(points)
        assert set(front) == expected
        assert len(front) == len(expected)
        assert [points[index] for index in front] == sorted(points[index] for index in front)


def outcome(trial: int, state: str, loss: float | None, hours: float) -> Outcome:
    return Outcome(
        trial=trial,
        state=state,
        loss=loss,
        val_loss=loss,
        val_ema_loss=None,
        device_hours=hours,
        steps=200,
        samples=6400,
        num_threads=1,
        restarts=0,
        reason="",
        settings={"learning_rate": 0.001},
        losses={},
    )


def test_a_pruned_or_failed_trial_is_neither_best_nor_on_the_front():
    trials = [
        outcome(0, "complete", 0.3, 2.0),
        outcome(1, "pruned", 0.2, 0.1),
        outcome(2, "failed", None, 0.0),
        outcome(3, "complete", 0.4, 1.0),
        outcome(4, "complete", 0.5, 1.5),
        outcome(5, "under way", 0.1, 0.1),
    ]
    assert [one.trial for one in front_of(trials)] == [3, 0]
    best = best_of(trials)
    assert best is not None
    assert best.trial == 0
    assert best_of(trials[1:3]) is None


def test_dollars_are_hours_times_each_price():
    lines = table([outcome(0, "complete", 0.3, 2.0)], (3.0, 5.12), "GPU-hours").splitlines()
    head, row = ([cell.strip() for cell in line.split("|")] for line in (lines[0], lines[2]))
    named = dict(zip(head, row, strict=True))
    assert (named["USD at 3"], named["USD at 5.12"]) == ("6.00", "10.24")
    assert (named["GPU-hours"], named["front"]) == ("2.0000", "*")
