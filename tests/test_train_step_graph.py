"""A recorded step: replayed, it is the step that Python would have handed out.

On a CPU the operators are recorded and replayed as a CUDA graph does it with kernels: Python does
not run again, so whatever it baked in, or put in another tensor's place, is wrong at once.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_recorder import OperatorRecorder
from helpers_train import MemoryBatches, small_config

from shards.errors import UserError
from train.metrics import read_metrics
from train.step_graph import WARM_UP_STEPS, StepGraph
from train.trainer import Trainer, build_accelerator

STEPS = 10
_FIGURES = ("train/loss", "train/grad_norm", "train/learning_rate")


def run(folder: Path, *, recorded: bool, until: int = STEPS, **settings: Any) -> Trainer:
    """A run of a few steps with a learning rate that never stands still."""
    settings = {"warmup_steps": 4, "lr_schedule": "cosine", **settings}
    config = small_config(folder, max_steps=STEPS, log_every=1, **settings)
    trainer = Trainer(config, MemoryBatches(), build_accelerator(config))
    if recorded:
        trainer.model.graph = StepGraph(OperatorRecorder())
    trainer.run(until)
    trainer.close()
    return trainer


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    model = trainer.model
    moments = {
        f"{number}.{name}": value
        for number, state in enumerate(model.update.optimizer.state.values())
        for name, value in state.items()
    }
    average = model.average.weights if model.average else {}
    return {
        **model.weights.tensors,
        **{f"in module {name}": weight for name, weight in model.weights.in_module.items()},
        **{f"average {name}": weight for name, weight in average.items()},
        **moments,
    }


def rows_of(trainer: Trainer) -> list[list[float]]:
    rows = read_metrics(trainer.run_dir / "metrics.jsonl")
    return [[row[name] for name in _FIGURES] for row in rows]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema_decay": 0.9},
        {"ema_decay": 0.9, "ema_start_step": 5},
        {"ema_decay": 0.9, "ema_every": 2},
        {"ema_decay": 0.9, "ema_every": 3},
        {"mixed_precision": "bf16-weights", "ema_decay": 0.9},
        {"mixed_precision": "bf16-weights", "micro_batch_size": 2},
        {"mixed_precision": "fp16"},
        {"micro_batch_size": 2, "offset_noise": 0.1, "timestep_sampling": "sobol"},
        {"batched_projections": "on", "mixed_precision": "bf16-weights"},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()) or "plain",
)
def test_replayed_steps_are_the_steps_to_the_bit(tmp_path, settings):
    plain = run(tmp_path / "plain", recorded=False, **settings)
    replayed = run(tmp_path / "replayed", recorded=True, **settings)
    assert rows_of(replayed) == rows_of(plain)
    assert len({row[0] for row in rows_of(plain)}) == STEPS, "every step has a loss of its own"
    expected, found = state_of(plain), state_of(replayed)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_step_is_recorded_once_for_each_thing_that_an_average_does(tmp_path):
    trainer = run(tmp_path, recorded=True, ema_decay=0.9, ema_start_step=5)
    recorder = trainer.model.graph._recorder
    assert recorder.num_recordings == 2
    assert recorder.num_forgotten == 2 * WARM_UP_STEPS, "the memory of one is wanted for the other"
    again = run(tmp_path / "none", recorded=True, until=WARM_UP_STEPS)
    assert again.model.graph._recorder.num_recordings == 0, "it warms up first"


def test_the_step_that_was_not_finite_is_named_from_a_replay(tmp_path):
    class Poisoned(MemoryBatches):
        def iter_batches(self, step, positions):
            for batch in super().iter_batches(step, positions):
                if batch.step == 7:
                    batch.moments[0] = float("nan")
                yield batch

    config = small_config(tmp_path, max_steps=STEPS, log_every=STEPS)
    trainer = Trainer(config, Poisoned(), build_accelerator(config))
    trainer.model.graph = StepGraph(OperatorRecorder())
    with pytest.raises(UserError, match="step 7"):
        trainer.run(STEPS)
    trainer.close()


def test_a_run_goes_on_from_a_checkpoint_of_replayed_steps(tmp_path):
    settings: dict[str, Any] = {"ema_decay": 0.9, "checkpoint_every": 5}
    whole = run(tmp_path / "whole", recorded=True, **settings)
    run(tmp_path / "cut", recorded=True, until=5, **settings)
    rest = run(tmp_path / "cut", recorded=True, **settings)
    assert rest.step == STEPS
    expected, found = state_of(whole), state_of(rest)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_recorder_shows_what_a_graph_cannot_hold(tmp_path):
    """A number of Python's that changes from step to step stays that of the recording."""
    total, added = torch.zeros(()), iter(range(1, 100))

    def function(value: torch.Tensor) -> tuple[torch.Tensor]:
        total.add_(value * next(added))
        return (total.clone(),)

    graph = StepGraph(OperatorRecorder())
    found = [graph.run(None, function, {"value": torch.ones(())})[0].item() for _ in range(6)]
    assert found == [1, 3, 6, 10, 14, 18], "4 is what Python passed while it was recorded"


def test_inputs_of_another_shape_or_type_are_recorded_apart():
    recorder = OperatorRecorder()
    graph = StepGraph(recorder)
    kinds = [torch.ones(2), torch.ones(3), torch.ones(2, dtype=torch.float16)]
    for number in range(WARM_UP_STEPS + 3):
        for value in kinds:
            (found,) = graph.run(None, lambda value: (value + 1,), {"value": value * number})
            assert torch.equal(found, value * number + 1)
            assert found.dtype == value.dtype
    assert recorder.num_recordings == len(kinds)
