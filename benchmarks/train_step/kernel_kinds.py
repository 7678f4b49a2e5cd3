"""What a kernel or an operator does, told by its name.

Names of cuDNN, cuBLAS, CUTLASS, torch and Triton as they stand in traces of training on Ampere and
Hopper; of our own kernels those in `train.fused`.
"""

from __future__ import annotations

import re
from functools import cache

OTHER = "other"
_ATEN_COPIES = (
    r"^aten::(cat|fill_|zero_|clone|contiguous|empty|empty_strided|empty_like|to|_to_copy|slice"
    r"|view|reshape|_unsafe_view|as_strided|resize_|transpose|t|permute|split|narrow|select)$"
)
# The first that matches; case does not matter. Fused attention is made of what looks like
# convolutions (`fprop`) or products (`cutlass`), and a copy is one of torch's elementwise kernels.
_KINDS = (
    ("attention", r"flash|fmha|sdpa|scaled_dot_product|efficient_attention|softmax"),
    ("compiled", r"CompiledFxGraph|^(graph|cpp_fused)_"),
    ("optimizer", r"multi_tensor_apply|adam|_foreach_|lpnorm|vector_norm|lerp|update_chunks"),
    (
        "norm",
        r"group_?norm|layer_?norm|rowwisemoments|gammabeta|computefusedparams"
        r"|computebackwardfusedparams|computeinternalgradients"
        r"|(tile|combine)_(statistics|gradients)|normalise|affine_gradients|input_gradient",
    ),
    ("copy, layout", r"nchwtonhwc|nhwctonchw|nchw_to_nhwc|nhwc_to_nchw|tensortransform"),
    ("convolution wgrad", r"wgrad"),
    ("convolution dgrad", r"dgrad"),
    ("convolution backward", r"conv(olution|2d)_backward"),
    ("convolution forward", r"fprop|implicit_(gemm|convolve)|convol|conv2d|winograd"),
    (
        "matrix product",
        r"nvjet|gemm|gemv|cutlass|cublas|splitk|triton_tem_"
        r"|^aten::(mm|bmm|addmm|baddbmm|mv|addmv|linear|matmul)$",
    ),
    ("activation", r"geglu|gelu|silu|sigmoid"),
    ("copy, layout", rf"memcpy|memset|copy|transpose|catarray|fillfunctor|upsample|{_ATEN_COPIES}"),
    ("elementwise, sums", r"elementwise|reduce_kernel|^aten::(add|mul|div|sub|sum|mean|neg)_?$"),
)
# What the compiler has fused is named after all that went into it, and after its neighbours: there
# an `attention` or a `convolution` is the bias or the layout of one.
_FUSED = re.compile(r"^triton_(poi|per|red)_fused_")
_FUSED_KINDS = (
    ("norm", r"group_norm|layer_norm"),
    ("activation", r"gelu|silu|sigmoid"),
    ("copy, layout", r"fused_(_to_copy|clone|copy|cat|view|permute|convolution|_)+_?\d*$"),
    ("elementwise, sums", r""),
)


def _compiled(kinds: tuple[tuple[str, str], ...]) -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in kinds)


_PATTERNS, _FUSED_PATTERNS = _compiled(_KINDS), _compiled(_FUSED_KINDS)


@cache
def kind_of(name: str) -> str:
    """The kind of a kernel or an operator; `other` where the name says nothing.

    Args:
        name: as the profiler gives it, with templates and arguments.
    """
    patterns = _FUSED_PATTERNS if _FUSED.match(name) else _PATTERNS
    return next((kind for kind, pattern in patterns if pattern.search(name)), OTHER)
