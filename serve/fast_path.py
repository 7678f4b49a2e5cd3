"""The switches that make a pipeline fast, and what turns them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from train.config import AttentionChoice, Switch

ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class FastPath:
    """How images are computed; what they show changes by rounding alone.

    `auto` is on where it can run and has passed its check on the device at hand, and off without a
    GPU, where the pipeline stays as diffusers built it.
    """

    dtype: ComputeDtype = "auto"
    """What U-Net, text encoder and VAE compute in; latents and the sampler stay in float32. auto:
    bfloat16 on GPUs that have it, float16 on older ones. A float16 VAE falls back to float32."""
    channels_last: Switch = "auto"
    """NHWC in the U-Net and the VAE, from end to end."""
    attention: AttentionChoice = "auto"
    """auto measures the kernels of each layer's shape on a GPU and takes the fastest; sizes that a
    kernel cannot run take the next one."""
    fused_norms: Switch = "auto"
    """GroupNorm, the time embedding before it and SiLU after it as one Triton kernel."""
    fused_geglu: Switch = "auto"
    """The feed-forward layers' gate as one Triton kernel."""
    batched_projections: Switch = "auto"
    """Queries, keys and values in one matrix product; keys and values of all cross-attentions, and
    the time embedding's projections, in one each."""
    conv_search: Switch = "auto"
    """cuDNN tries its algorithms when a convolution first meets a shape."""
    compile: Switch = "auto"
    """torch.compile of U-Net and VAE for `compiled_shapes`, at the start; no request ever waits for
    the compiler."""
    compiled_shapes: tuple[str, ...] = ()
    """BATCHxHEIGHTxWIDTH in pixels, guided; default: one image of the model's own size. Each one
    that is named is also run at the start, compiled or not."""
    cuda_graphs: Switch = "auto"
    """Record text encoder, U-Net and VAE once for each shape and replay them."""
    max_graphs: int = 32
    """Recordings kept; of more shapes those go that were not used for the longest time."""


def apply_fast_path(pipeline: Any, fast: FastPath, device: Any) -> list[str]:
    """Turn the switches on that can be, in place, and run the shapes named once.

    Where none is on the pipeline stays as it is. Else its U-Net is another module afterwards, of
    the same `config`; use and replace `pipeline.scheduler` as before, and do not move the pipeline.

    Args:
        pipeline: diffusers `StableDiffusionPipeline`, float32, on `device`.
        fast: the switches.
        device: `torch.device` or its name.

    Returns:
        a line for each switch: what is on, and why something is not that was asked for or that a
        GPU might have.

    Raises:
        UserError: a shape that cannot be, or an attention kernel asked for does not run here.
    """
    import torch

    from serve.fast.apply import make_fast

    return make_fast(pipeline, fast, torch.device(device))
