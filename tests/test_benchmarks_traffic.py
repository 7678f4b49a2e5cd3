"""Bytes of the training step: held to hand-counted operators, and to the figures that are stated.

On the releases below the figures of Stable Diffusion 2 are exact; others may take an operator
apart in another way, and get 2%.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.__main__ import main
from benchmarks.train_step.traffic import ladder_rows
from benchmarks.train_step.traffic_compiled import count_compiled
from benchmarks.train_step.traffic_cuda import CudaFunctions, CudaLayouts
from benchmarks.train_step.traffic_operators import OperatorTraffic, kind_of
from benchmarks.train_step.traffic_unet import Setting, count_traffic
from benchmarks.train_step.traffic_update import update_bytes_per_parameter
from train.step_plan import StepPlan
from train.unet import load_unet_config

COUNTED_ON = ("2.13", "0.42")  # torch, diffusers
ROUGHLY = 0.0 if (torch.__version__[:4], diffusers.__version__[:4]) == COUNTED_ON else 0.02

# Bytes of an image, of each step whatever its images, saved of an image; operators; at 512 px.
SD2 = {
    "autocast": (11_250_915_344, 15_532_522_572, 1_246_578_304, 3357),
    "bf16-weights": (7_728_503_568, 5_142_921_244, 936_611_840, 1888),
    "fused-update": (7_728_503_568, 5_142_921_244, 936_611_840, 1888),
    "channels-last": (8_187_583_248, 5_142_921_244, 969_052_160, 2038),
    "fused-norms": (7_282_489_872, 5_143_423_004, 870_135_552, 1635),
    "fused-geglu": (6_358_432_272, 5_143_423_004, 777_729_792, 1571),
    "batched-projections": (6_032_411_920, 5_143_423_004, 777_676_032, 1188),
}
# The same of each image with its share of a step's, in a micro-batch of 32, as counted before by
# others' means: with a copy of each attention's output, and loss and states in low precision.
COUNTED_BEFORE = {"autocast": 11.93e9, "bf16-weights": 7.96e9}
SAVED_BEFORE = {"autocast": 1240e6, "bf16-weights": 935e6}

BARE = StepPlan(
    compile="off",
    channels_last=False,
    fused_update=False,
    fused_norms=False,
    fused_geglu=False,
    batched_projections=False,
    conv_search=False,
    cuda_graph=False,
)
# One residual block and one transformer down, a residual block up.
SMALL: dict[str, Any] = {
    "block_out_channels": [16],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "in_channels": 4,
    "out_channels": 4,
    "use_linear_projection": True,
}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def bytes_of(run: Any) -> int:
    with OperatorTraffic() as counter:
        run()
    return counter.num_bytes.total()


# Operators ----------------------------------------------------------------------------------------


def test_an_operator_reads_its_inputs_and_writes_its_output():
    assert bytes_of(lambda: meta(5, 7) @ meta(7, 11)) == 2 * (5 * 7 + 7 * 11 + 5 * 11)
    assert bytes_of(lambda: F.silu(meta(13, dtype=torch.float32))) == 4 * 2 * 13


def test_views_and_allocations_move_nothing():
    def look() -> None:
        tensor = meta(4, 6, 8)
        tensor.view(24, 8).t().unflatten(1, (4, 6))[2].unsqueeze(0).expand(3, -1, -1, -1)
        torch.empty_like(tensor).detach().permute(2, 0, 1).chunk(2)

    with OperatorTraffic() as counter:
        look()
    assert not counter.num_bytes
    assert not counter.num_calls


def test_what_is_expanded_is_read_once():
    assert bytes_of(lambda: meta(1, 1000).expand(1000, -1) + meta(1000, 1)) == 2 * (2000 + 10**6)


def test_in_place_operators_write_what_they_change_and_read_only_what_they_need():
    tensor, other = meta(10, 10), meta(10, 10)
    assert bytes_of(lambda: tensor.add_(other)) == 2 * 300
    assert bytes_of(lambda: tensor.copy_(other)) == 2 * 200
    assert bytes_of(lambda: tensor.zero_()) == 2 * 100
    assert bytes_of(lambda: torch.zeros_like(tensor)) == 2 * 100
    assert bytes_of(lambda: torch._foreach_copy_([tensor, tensor], [other, other])) == 4 * 200
    averages = [meta(10, 10, dtype=torch.float32)]
    assert bytes_of(lambda: torch._foreach_lerp_(averages, averages, 0.5)) == 4 * 300


# As on a GPU --------------------------------------------------------------------------------------


def test_a_group_norm_between_channels_last_convolutions_is_copied_in_and_out():
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False, device="meta", dtype=torch.bfloat16)
    conv.to(memory_format=torch.channels_last)
    activation = 2 * 2 * 8 * 5 * 5
    images = meta(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), OperatorTraffic() as counter, CudaLayouts():
        hidden = F.group_norm(conv(images), 4)
        assert hidden.is_contiguous()
        output = conv(hidden)
    assert output.is_contiguous(memory_format=torch.channels_last)
    copies = {name for name in counter.num_calls if kind_of(name) == "copy"}
    assert sum(counter.num_calls[name] for name in copies) == 2
    assert sum(counter.num_bytes[name] for name in copies) == 2 * 2 * activation
    assert counter.num_bytes["aten::convolution"] == 2 * (2 * activation + 2 * 8 * 8 * 3 * 3)


def test_in_nchw_nothing_is_copied():
    conv = nn.Conv2d(8, 8, 1, device="meta")
    with OperatorTraffic() as counter, CudaLayouts():
        hidden = F.group_norm(conv(meta(2, 8, 5, 5, dtype=torch.float32)), 4)
        conv(hidden).square().sum().backward()
    assert "conv" in map(kind_of, counter.num_calls)
    assert "copy" not in map(kind_of, counter.num_calls)


def test_autocast_computes_norms_in_float32_and_products_in_low_precision():
    images, linear = meta(2, 8, 4, 4, dtype=torch.float32), nn.Linear(4, 4, device="meta")
    with CudaFunctions(autocast=torch.bfloat16):
        projected = linear(images)
        normed = F.group_norm(projected, 4)
        heads = projected.float()
        attended = F.scaled_dot_product_attention(heads, heads, heads)
    assert projected.dtype == torch.bfloat16
    assert normed.dtype == torch.float32
    assert attended.dtype == torch.bfloat16
    with CudaFunctions():
        assert linear(images).dtype == torch.float32


def test_attention_is_one_operator_that_keeps_no_matrix_of_tokens():
    heads = meta(1, 2, 64, 16).requires_grad_()
    with OperatorTraffic() as counter, CudaFunctions():
        F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.0).square().sum().backward()
    attention = {name: n for name, n in counter.num_bytes.items() if "attention" in name}
    tokens, sums = 2 * heads.numel(), 4 * 2 * 64  # bytes
    assert len(attention) == 2
    assert sum(attention.values()) == pytest.approx(12 * tokens + 2 * sums, abs=64)


# A U-Net ------------------------------------------------------------------------------------------


def test_images_and_steps_add_up_to_the_bytes_of_any_micro_batch():
    setting = Setting(plan=replace(BARE, channels_last=True), low_weights=True)
    small, large = (count_traffic(SMALL, 8, setting, batch) for batch in (2, 40))
    assert small.image_bytes == large.image_bytes
    assert small.step_bytes == large.step_bytes
    assert small.bytes_per_image_in_batch * 2 == small.bytes_per_image * 2 + small.bytes_per_step


@pytest.fixture(scope="module")
def sd2() -> dict[str, dict[str, Any]]:
    rows = ladder_rows(load_unet_config("sd2-base"), resolutions=[512])
    return {row["rung"]: row for row in rows}


@pytest.mark.parametrize("rung", list(SD2))
def test_the_bytes_of_stable_diffusion_2_are_those_stated(sd2, rung):
    names = ("bytes_per_image", "bytes_per_step", "saved_bytes_per_image", "num_operators")
    found = tuple(sd2[rung][name] for name in names)
    # What our kernels keep between their passes depends on how they cut up an image.
    tolerance = max(ROUGHLY, 1e-4 if "fused_norms" in sd2[rung]["switches"] else 0.0)
    assert found == pytest.approx(SD2[rung], rel=tolerance)


@pytest.mark.parametrize("rung", list(COUNTED_BEFORE))
def test_they_are_what_was_counted_before(sd2, rung):
    row = sd2[rung]
    assert row["bytes_per_image_in_batch"] == pytest.approx(COUNTED_BEFORE[rung], rel=0.02)
    assert row["saved_bytes_per_image"] == pytest.approx(SAVED_BEFORE[rung], rel=0.006)


def test_every_rung_moves_less_but_for_the_layout_alone(sd2):
    """Eager group norms go through NCHW: channels-last pays with kernels that do not."""
    figures = [row["bytes_per_image_with_update"] for row in sd2.values()]
    rises = [after > before for before, after in itertools.pairwise(figures)]
    names = list(sd2)[1:]
    assert dict(zip(names, rises, strict=True)) == {name: name == "channels-last" for name in names}
    assert list(sd2) == list(SD2)


def test_weights_are_read_twice_and_their_gradients_written_once_in_each_step(sd2):
    row = sd2["bf16-weights"]
    assert row["num_parameters"] == 865_910_724
    assert row["bytes_per_step"] == pytest.approx(3 * 2 * row["num_parameters"], rel=0.02)
    casts = 2 * (4 + 2) * row["num_parameters"]  # down, and the gradients up
    autocast = sd2["autocast"]["bytes_per_step"]
    assert autocast == pytest.approx(row["bytes_per_step"] + casts, rel=0.001)


# The update ---------------------------------------------------------------------------------------


def test_the_update_reads_and_writes_so_many_bytes_for_each_parameter():
    """torch's AdamW writes gradients back, because it is asked to divide them."""
    adamw, norm, average = 4 * (4 + 4), 4, 3 * 4
    separate = update_bytes_per_parameter(low_weights=True, fused=False)
    assert separate == {
        "aten::_foreach_copy_": (2 + 4) + (4 + 2),
        "aten::_foreach_norm": norm,
        "aten::_fused_adamw_": adamw,
        "aten::_foreach_lerp_": average,
    }
    float32 = update_bytes_per_parameter(low_weights=False, fused=False)
    assert sum(float32.values()) == adamw + norm + average
    fused = update_bytes_per_parameter(low_weights=True, fused=True)
    assert sorted(fused.values()) == [2, 36]


# Compiled -----------------------------------------------------------------------------------------


def test_compiling_fuses_what_is_neither_product_nor_convolution():
    setting = Setting(
        plan=replace(BARE, channels_last=True, fused_norms=True, batched_projections=True),
        low_weights=True,
    )
    eager, compiled = (count(SMALL, 8, setting, 4) for count in (count_traffic, count_compiled))
    for kind in ("conv", "linear", "attention"):
        assert compiled.image_bytes[kind] == eager.image_bytes[kind]
    assert 0 < compiled.image_bytes["norm"] < eager.image_bytes["norm"], "layer norms are fused"
    assert compiled.image_bytes["fused"] > 0
    assert compiled.bytes_per_image < eager.bytes_per_image
    assert compiled.num_operators < eager.num_operators


# The command --------------------------------------------------------------------------------------


def test_the_command_prints_every_rung_and_ends_with_one_json_line(tmp_path, capsys):
    unet, out = tmp_path / "unet.json", tmp_path / "traffic.json"
    unet.write_text(json.dumps(SMALL))
    main(["traffic", "--unet", str(unet), "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result == json.loads(out.read_text())
    assert (result["theme"], result["variant"]) == ("traffic", "unet")
    rungs = [row["rung"] for row in result["rows"]]
    assert rungs == [rung for rung in SD2 for _ in range(2)], "at two resolutions each"
    for row in result["rows"]:
        assert row["bytes_per_image"] == sum(row["image_bytes"].values())
        assert row["bytes_per_image_with_update"] > row["bytes_per_image_in_batch"]
        assert sum(line.startswith(row["rung"]) for line in lines) == 2, "in both tables"
