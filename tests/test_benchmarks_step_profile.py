"""Where the time of a step goes: gaps, kinds of kernels, operators' own time, from traces."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

from benchmarks.train_step.kernel_kinds import OTHER, kind_of
from benchmarks.train_step.profile_table import print_profile
from benchmarks.train_step.step_profile import (
    NUM_TOP,
    Span,
    find_gaps,
    own_times,
    profile_steps,
    summarise,
    tally,
)


def event(name: str, ts: float, dur: float, cat: str = "kernel", tid: int = 7) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": tid}


# The timeline -------------------------------------------------------------------------------------


def test_gaps_are_what_no_kernel_covers_though_kernels_overlap_and_come_in_any_order():
    spans = [
        Span("c", 140.0, 10.0),  # 20 us after b ended, not after a
        Span("a", 0.0, 100.0),
        Span("inside", 10.0, 5.0),
        Span("b", 90.0, 30.0),
        Span("d", 153.0, 7.0),  # 3 us: idle, but too short to count as a gap
        Span("e", 260.0, 40.0),
    ]
    found = find_gaps(spans)
    assert found["span_ms"] == pytest.approx(0.3)
    assert found["busy_frac"] == pytest.approx(1 - (20 + 3 + 100) / 300)
    assert found["num_gaps"] == 2
    assert found["gaps_ms"] == pytest.approx(0.12)
    assert found["largest"] == [
        {"us": 100.0, "after": "d", "before": "e"},
        {"us": 20.0, "after": "b", "before": "c"},
    ]


def test_the_kernel_before_a_gap_is_the_one_that_ended_last_not_the_one_that_began_last():
    spans = [Span("long", 0.0, 50.0), Span("short", 10.0, 5.0), Span("next", 70.0, 1.0)]
    assert find_gaps(spans)["largest"] == [{"us": 20.0, "after": "long", "before": "next"}]


def test_five_gaps_are_named_of_as_many_as_there_are():
    spans = [Span(str(number), 100.0 * number, 90.0 - number) for number in range(10)]
    found = find_gaps(spans)
    assert found["num_gaps"] == 9
    assert [gap["us"] for gap in found["largest"]] == [18.0, 17.0, 16.0, 15.0, 14.0]


def test_a_single_kernel_leaves_no_gap():
    assert find_gaps([Span("only", 5.0, 2.0)])["busy_frac"] == 1.0


def test_a_profiler_that_sees_no_kernel_gives_no_result():
    with pytest.raises(RuntimeError, match="saw nothing"):
        summarise([event("aten::mm", 0, 500, "cpu_op")], num_steps=2, device="cuda")


# The sums -----------------------------------------------------------------------------------------


def test_time_is_summed_per_step_by_name_and_by_kind_and_shares_add_up():
    spans = [Span("nvjet_a", 0, 30.0), Span("nvjet_a", 40, 10.0), Span("sm90_wgrad_b", 60, 60.0)]
    found = tally(spans, num_steps=2)
    assert found["ms_per_step"] == pytest.approx(0.05)
    assert [row["name"] for row in found["top"]] == ["sm90_wgrad_b", "nvjet_a"]
    product = found["top"][1]
    assert product["count_per_step"] == 1.0
    assert product["mean_us"] == 20.0
    assert product["share_frac"] == pytest.approx(0.4)
    assert [row["kind"] for row in found["kinds"]] == ["convolution wgrad", "matrix product"]
    assert math.isclose(sum(row["share_frac"] for row in found["kinds"]), 1.0)


def test_the_top_has_its_length_and_the_kinds_have_all_of_it():
    spans = [Span(f"gemm_{number}", 0, float(number + 1)) for number in range(NUM_TOP + 9)]
    found = tally(spans, 1)
    assert len(found["top"]) == NUM_TOP
    assert found["kinds"][0]["count_per_step"] == NUM_TOP + 9


def test_on_a_gpu_kernels_count_and_launches_are_those_of_runtime_and_driver():
    events = [
        event("nvjet_a", 0, 10),
        event("Memcpy DtoD (Device -> Device)", 30, 10, "gpu_memcpy"),
        event("aten::mm", 0, 500, "cpu_op"),
        event("ProfilerStep#3", 0, 900, "gpu_user_annotation"),
        event("cudaLaunchKernel", 0, 3, "cuda_runtime"),
        event("cudaLaunchKernel", 5, 3, "cuda_runtime"),
        event("cuLaunchKernelEx", 5, 3, "cuda_driver"),
        event("cudaGraphLaunch", 5, 3, "cuda_runtime"),
        event("cudaStreamSynchronize", 5, 3, "cuda_runtime"),
        {"ph": "M", "name": "process_name"},
    ]
    found = summarise(events, num_steps=2, device="cuda")
    assert found["ms_per_step"] == pytest.approx(0.01)
    assert found["timeline"]["busy_frac"] == pytest.approx(0.5)
    launches = {"cudaLaunchKernel": 1.0, "cuLaunchKernelEx": 0.5, "cudaGraphLaunch": 0.5}
    assert found["launches_per_step"] == launches


def test_on_a_cpu_an_operator_counts_without_those_that_it_calls():
    events = [
        event("outer", 0, 100, "cpu_op", tid=1),
        event("inner", 10, 40, "cpu_op", tid=1),
        event("innermost", 15, 10, "cpu_op", tid=1),
        event("inner", 60, 20, "cpu_op", tid=1),
        event("elsewhere", 20, 50, "cpu_op", tid=2),
        event("after", 100, 5, "cpu_op", tid=1),
    ]
    found = [(span.name, span.duration_us) for span in own_times(events)]
    assert sorted(found) == [
        ("after", 5.0),
        ("elsewhere", 50.0),
        ("inner", 20.0),
        ("inner", 30.0),
        ("innermost", 10.0),
        ("outer", 40.0),
    ]


# Kinds --------------------------------------------------------------------------------------------

HALF = "at::native::(anonymous namespace)::"
KERNELS = {
    "convolution forward": (
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warp",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x256>",
        "void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1, false>",
        "aten::mkldnn_convolution",
    ),
    "convolution dgrad": (
        "sm80_xmma_dgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128>",
    ),
    "convolution wgrad": (
        "sm90_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize256",
        "void cudnn::cnn::wgrad2d_grouped_direct_kernel<float, float>",
    ),
    "convolution backward": ("aten::convolution_backward", "aten::_slow_conv2d_backward"),
    "matrix product": (
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_nn>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>",
        "triton_tem_fused_addmm_view_3",
        "aten::addmm",
    ),
    "attention": (
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_11_64x64x64_1x1x1",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "norm": (
        f"void {HALF}RowwiseMomentsCUDAKernel<c10::BFloat16>(long, float)",
        f"void {HALF}ComputeInternalGradientsCUDAKernel<c10::BFloat16>",
        f"void {HALF}vectorized_layer_norm_kernel<c10::BFloat16, float>",
        f"void {HALF}GammaBetaBackwardCUDAKernel2<float>",
        "triton_red_fused_native_group_norm_silu_4",
        "triton_per_fused_native_layer_norm_native_layer_norm_backward_12",
        "tile_statistics",
        "combine_gradients",
        "normalise",
        "input_gradient",
        "aten::native_group_norm_backward",
    ),
    "activation": (
        f"void at::native::vectorized_elementwise_kernel<4, {HALF}silu_kernel(at::TensorIterator)>",
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(...)>",
        "geglu",
        "geglu_gradient",
        "triton_poi_fused_convolution_silu_silu_backward_7",
    ),
    "copy, layout": (
        "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>",
        "void at::native::elementwise_kernel<128, 4, gpu_kernel_impl<direct_copy_kernel_cuda>>",
        f"void {HALF}CatArrayBatchedCopy_vectorized<OpaqueType<2u>, unsigned int, 4, 128>",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
        "triton_poi_fused__to_copy_21",
        "triton_poi_fused_clone_3",
    ),
    "optimizer": (
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<LpNormFunctor>",
        "update_chunks",
        "aten::_fused_adamw_",
    ),
    "elementwise, sums": (
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<BFloat16>>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, func_wrapper_t>>",
        "triton_poi_fused_add_mul_17",
        "triton_poi_fused__scaled_dot_product_flash_attention_add_view_9",
        "triton_red_fused_add_convolution_backward_sum_8",
    ),
    "compiled": ("## Call CompiledFxGraph fbfp7nzfguqfuhesmrhml46y7x ##",),
    OTHER: ("void some_kernel_that_nobody_knows<float>(int)", "aten::embedding"),
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in KERNELS.items() for name in names]
)
def test_a_kernel_is_known_by_its_name(kind, name):
    assert kind_of(name) == kind


def test_every_kernel_of_ours_has_a_kind():
    names = []
    for path in (REPOSITORY / "train" / "fused").glob("*_kernel*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if line.startswith("@triton.jit"):
                name = lines[number + 1].removeprefix("def ").partition("(")[0]
                names += [] if name.startswith("_") else [name]
    assert len(names) > 5
    assert [name for name in names if kind_of(name) == OTHER] == []


# The profiler -------------------------------------------------------------------------------------


def test_real_steps_are_profiled_and_printed(tmp_path, capsys):
    layer = torch.nn.Conv2d(4, 8, 3)
    images = torch.randn(2, 4, 16, 16)

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            layer(images).square().sum().backward()

    found = profile_steps(run, 3, "cpu", tmp_path / "trace.json")
    kinds = {row["kind"]: row for row in found["kinds"]}
    assert kinds["convolution backward"]["ms_per_step"] > 0
    assert kinds["convolution forward"]["ms_per_step"] > 0
    backward = next(row for row in found["top"] if row["name"] == "aten::convolution_backward")
    assert backward["count_per_step"] == 1.0
    total = sum(row["ms_per_step"] for row in kinds.values())
    assert total == pytest.approx(found["ms_per_step"])
    assert (tmp_path / "trace.json").exists()
    print_profile({"rung": "base", **found})
    assert "convolution backward" in capsys.readouterr().out


def test_the_timeline_is_printed_with_what_came_before_and_after_a_gap(capsys):
    events = [event("nvjet_a", 0, 10), event("wgrad_b", 110, 90)]
    events.append(event("cudaGraphLaunch", 0, 1, "cuda_runtime"))
    print_profile({"rung": "cuda-graph", **summarise(events, 1, "cuda")})
    printed = capsys.readouterr().out
    assert "busy 50.0% of 0.20 ms a step; 1 gaps over 5 us in 1 steps, 0.10 ms" in printed
    assert "100.0 us after nvjet_a, before wgrad_b" in printed
    assert "cudaGraphLaunch 1" in printed
