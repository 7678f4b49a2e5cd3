"""Which switches are on, on which device, and that the log says why one is not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_train import MemoryBatches, small_config, write_unet

from shards.errors import UserError
from train import step_plan
from train.config import TrainConfig
from train.fused.triton_runtime import missing
from train.precision import Precision, resolve_precision
from train.step_plan import StepPlan, agreed, plan_step
from train.trainer import Trainer, build_accelerator
from train.tuned import tuned_path, write_tuned

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KERNELS = ("fused_update", "fused_norms", "fused_geglu")
SWITCHES = ("channels_last", *KERNELS, "batched_projections", "conv_search", "cuda_graph")
BF16 = Precision("bf16-weights", torch.bfloat16, autocast=False)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU where all is well; returns what is to be wrong with a kernel, by its name."""
    wrong: dict[str, str] = {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(step_plan, "missing", lambda device: wrong.get("triton"))
    monkeypatch.setattr(step_plan, "compile_failure", lambda device: wrong.get("compiler"))
    monkeypatch.setattr(
        "train.fused.self_check.failure_of", lambda kernel, device, dtype: wrong.get(kernel)
    )
    return wrong


def plan(device: torch.device, processes: int = 1, **settings: str) -> StepPlan:
    return plan_step(TrainConfig(**settings), BF16, device, processes)


def on_in(found: StepPlan) -> set[str]:
    return {name for name in SWITCHES if getattr(found, name)}


def test_a_gpu_has_all_of_it_unless_told_otherwise(gpu):
    found = plan(CUDA)
    assert on_in(found) == set(SWITCHES)
    assert found.compile == "full"
    assert found.notes == ()


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_turns_off_alone_and_without_a_word(gpu, name):
    found = plan(CUDA, **{name: "off"})
    assert on_in(found) == set(SWITCHES) - {name}
    assert found.notes == ()


@pytest.mark.parametrize("mode", ["off", "regional", "full"])
def test_what_is_asked_of_the_compiler_is_what_it_does(gpu, mode):
    assert plan(CUDA, compile=mode).compile == mode
    assert plan(CPU, compile=mode).compile == mode


def test_a_cpu_is_left_alone():
    found = plan(CPU)
    assert on_in(found) == {"channels_last"}
    assert found.compile == "off"
    assert found.notes == (), "nobody asked for more"


@pytest.mark.parametrize("name", [*KERNELS, "conv_search", "cuda_graph"])
def test_what_was_asked_for_and_cannot_run_is_off_and_said(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = plan(CPU, **{name: "on"})
    assert on_in(found) == {"channels_last"}
    assert found.notes == (f"{name} off: no CUDA device",)


@pytest.mark.parametrize("kernel", ["update", "norms", "geglu"])
def test_a_kernel_that_disagrees_with_torch_is_off_and_said(gpu, kernel):
    gpu[kernel] = "off by 0.3"
    found = plan(CUDA)
    assert on_in(found) == set(SWITCHES) - {f"fused_{kernel}"}
    assert found.notes == (f"fused_{kernel} off: off by 0.3",)


def test_without_triton_the_rest_is_still_on(gpu):
    gpu["triton"] = "Triton is not installed"
    found = plan(CUDA)
    assert on_in(found) == set(SWITCHES) - set(KERNELS)
    assert found.compile == "off"
    assert len(found.notes) == 4
    assert all("Triton is not installed" in note for note in found.notes)


def test_without_a_compiler_nothing_is_compiled(gpu):
    gpu["compiler"] = "Failed to find C compiler"
    found = plan(CUDA)
    assert found.compile == "off"
    assert found.notes == ("compile off: Failed to find C compiler",)


def test_a_graph_holds_one_process(gpu):
    found = plan(CUDA, processes=8)
    assert on_in(found) == set(SWITCHES) - {"cuda_graph"}
    assert "one process" in found.notes[0]


def test_sharded_weights_are_compiled_by_block_and_projected_one_by_one(gpu):
    found = plan(CUDA, processes=8, sharding="zero2")
    assert on_in(found) == {*KERNELS, "channels_last", "conv_search"}
    assert found.compile == "regional"


def test_what_the_ladder_found_slow_on_such_a_device_is_off_and_said(gpu):
    config = TrainConfig(unet="sd2-base", resolution=512)
    path = write_tuned(config, CUDA, {"fused_geglu": "0.97x in the ladder", "compile": "0.9x"})
    assert path.name.startswith("nvidia-h200_sd2-base-")
    found = plan(CUDA, unet="sd2-base", resolution=512)
    assert on_in(found) == set(SWITCHES) - {"fused_geglu"}
    assert found.compile == "off"
    assert "fused_geglu off: 0.97x in the ladder" in found.notes
    asked = plan(CUDA, unet="sd2-base", resolution=512, fused_geglu="on", compile="full")
    assert on_in(asked) == set(SWITCHES), "who asks gets it"
    assert asked.compile == "full"
    assert on_in(plan(CUDA, unet="sd2-base", resolution=256)) == set(SWITCHES), "another size"
    assert plan(CPU, unet="sd2-base", resolution=512).notes == ()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "off": [1]}', "\x00"])
def test_a_broken_file_of_the_ladder_is_named_with_its_remedy(gpu, text):
    path = write_tuned(TrainConfig(), CUDA, {})
    path.write_text(text)
    with pytest.raises(UserError, match="Remedy: delete it") as raised:
        plan(CUDA)
    assert str(path) in str(raised.value)


def test_a_home_that_cannot_be_read_has_nothing_to_say(gpu, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for home in (tmp_path / "file", Path("/proc/1/nowhere")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        assert on_in(plan(CUDA)) == set(SWITCHES)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert on_in(plan(CUDA)) == set(SWITCHES)


def test_unets_of_one_name_are_told_apart(gpu, tmp_path):
    paths = [
        tuned_path(TrainConfig(unet=write_unet(tmp_path / name / "config.json", **changes)), CUDA)
        for name, changes in (("a", {}), ("b", {"layers_per_block": 2}), ("c", {}))
    ]
    assert paths[0] != paths[1]
    assert paths[0] == paths[2]


def test_blocks_that_are_compiled_once_for_each_kind_are_not_batched(gpu):
    found = plan(CUDA, compile="regional")
    assert on_in(found) == set(SWITCHES) - {"batched_projections"}
    assert "--compile full" in found.notes[0]
    assert plan(CUDA, compile="regional", batched_projections="on").batched_projections


def test_processes_compute_with_what_all_of_them_can_have(gpu):
    whole = plan(CUDA)
    gpu["norms"] = "off by 0.3"
    poorer = replace(plan(CUDA), compile="off")
    found = agreed([whole, whole, poorer])
    assert on_in(found) == set(SWITCHES) - {"fused_norms"}
    assert found.compile == "off"
    assert found.notes == tuple(
        f"{name} off: it is on another process" for name in ("fused_norms", "compile")
    )
    assert agreed([poorer, whole]) == poorer, "it has said why"
    assert agreed([whole, whole]) == whole


def test_an_interpreter_is_nothing_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert missing(CUDA) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in missing(CUDA)


def test_a_gpu_with_bfloat16_keeps_its_weights_in_it(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for has_bf16, name in ((True, "bf16-weights"), (False, "no")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda answer=has_bf16: answer)
        assert resolve_precision("auto", CUDA).name == name


def test_the_log_says_what_is_on_and_why_the_rest_is_not(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    config = small_config(tmp_path, batched_projections="on", fused_norms="on")
    trainer = Trainer(config, MemoryBatches(), build_accelerator(config))
    trainer.announce()
    trainer.close()
    said = capsys.readouterr().out
    assert "channels_last, batched_projections" in said
    assert "fused_norms off: no CUDA device" in said


def test_a_run_goes_on_with_other_switches(tmp_path):
    """None of them defines a run: a checkpoint of one machine goes on on another."""
    config = small_config(tmp_path, max_steps=4)
    other = replace(config, batched_projections="on", channels_last="off", compile="off")
    assert config.defining_fields() == other.defining_fields()
    first = Trainer(config, MemoryBatches(), build_accelerator(config))
    first.run(2)
    first.save()
    first.close()
    second = Trainer(other, MemoryBatches(), build_accelerator(other))
    assert second.step == 2
    before, after = first.model.weights.tensors, second.model.weights.tensors
    assert list(before) == list(after), "diffusers' names, in diffusers' order"
    assert all(torch.equal(before[name], after[name]) for name in before)
    second.run(4)
    second.close()
