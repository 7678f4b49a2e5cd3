"""Text encoder, U-Net and VAE as functions of tensors: compiled for some shapes, replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from precompute.compilation import compile_encode
from serve.fast.graphs import GraphCache

Function = Callable[..., Tensor]


class Machinery:
    """How the parts of one pipeline run.

    Args:
        device: of the pipeline.
        graphs: of all parts; None where nothing is recorded.
        conv_search: whether cuDNN tries its algorithms.
        compiles: see below.

    Attributes:
        compiles: whether parts are compiled for the shapes of a warm-up.
        is_warming: whether the shapes that come now are those of the warm-up.
    """

    def __init__(
        self,
        device: torch.device,
        graphs: GraphCache | None = None,
        *,
        conv_search: bool = False,
        compiles: bool = False,
    ) -> None:
        self.device, self.graphs = device, graphs
        self.compiles, self.is_warming = compiles, False
        self._conv_search = conv_search

    @contextmanager
    def running(self) -> Iterator[None]:
        """On the device, whichever is this thread's; with cuDNN's search where it is on."""
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        searched = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self._conv_search or searched
        try:
            with on_device:
                yield
        finally:
            torch.backends.cudnn.benchmark = searched


class FastPart:
    """One part: a function that computes in one dtype, from and to float32.

    Args:
        name: of the part, for the log.
        function: of tensors by name, to one tensor; whatever else it reads stays in place.
        dtype: that floating-point inputs are cast to.
        machinery: how it runs.
        uncast: names of inputs that keep their type.
        can_compile: whether it is worth the compiler's time.
    """

    def __init__(
        self,
        name: str,
        function: Function,
        dtype: torch.dtype,
        machinery: Machinery,
        *,
        uncast: tuple[str, ...] = (),
        can_compile: bool = True,
    ) -> None:
        self._name, self._function, self._dtype = name, function, dtype
        self._machinery, self._uncast = machinery, uncast
        self._compiled: Function | None = None
        if can_compile and machinery.compiles:
            self._compiled = compile_encode(function)
        self._compiled_for: set[tuple[torch.Size, ...]] = set()

    @torch.no_grad()
    def __call__(self, **inputs: Tensor) -> Tensor:
        """The function's result in float32, in memory of its own.

        Args:
            inputs: of any device and floating type.
        """
        machinery = self._machinery
        inputs = {name: self._taken_over(name, tensor) for name, tensor in inputs.items()}
        function = self._function_for(inputs)
        with machinery.running():
            if machinery.graphs is None:
                output = function(**inputs)
            else:
                (output,) = machinery.graphs.run(
                    self._name, lambda **given: (function(**given),), inputs
                )
            return output.to(torch.float32, copy=True)  # a replay would overwrite it

    def _taken_over(self, name: str, tensor: Tensor) -> Tensor:
        is_cast = tensor.is_floating_point() and name not in self._uncast
        return tensor.to(self._machinery.device, self._dtype if is_cast else tensor.dtype)

    def _function_for(self, inputs: dict[str, Tensor]) -> Function:
        """Compiled for the shapes of the warm-up alone: each takes long, and there is no end."""
        if self._compiled is None or not self._machinery.compiles:
            return self._function
        key = tuple(tensor.shape for tensor in inputs.values())
        if self._machinery.is_warming:
            self._compiled_for.add(key)
        return self._compiled if key in self._compiled_for else self._function


class FastUnet(nn.Module):
    """A U-Net in the place of a pipeline's own, whose prediction is float32.

    Args:
        unet: diffusers `UNet2DConditionModel`.
        machinery: how it runs.
    """

    def __init__(self, unet: Any, machinery: Machinery) -> None:
        super().__init__()
        self.unet = unet
        self._part = FastPart("U-Net", self._predict, unet.dtype, machinery, uncast=("timesteps",))

    @property
    def config(self) -> Any:
        """That of the U-Net inside."""
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        dtype: torch.dtype = self.unet.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        device: torch.device = self.unet.device
        return device

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor]:
        """As a pipeline of Stable Diffusion calls it, which passes nothing else that is not None.

        Args:
            sample: [B, C, h, w] float32.
            timestep: of all samples; a number on the CPU, so that nobody waits for the device.
            encoder_hidden_states: [B, T, D].

        Returns:
            the prediction, [B, C, h, w] float32.
        """
        assert timestep.device.type == "cpu", "the device would have to be waited for"
        # A kernel fills it in that has the number as its argument; a copy would wait.
        timesteps = torch.full((1,), timestep.item(), device=sample.device, dtype=torch.float32)
        return (self._part(sample=sample, timesteps=timesteps, states=encoder_hidden_states),)

    def _predict(self, sample: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        prediction: Tensor = self.unet(sample, timesteps, states, return_dict=False)[0]
        return prediction


class FastDecode:
    """`decode` of a VAE, from float32 latents to float32 pixels.

    In float16 activations may overflow. Then the VAE becomes a float32 one, for good.

    Args:
        vae: diffusers `AutoencoderKL`.
        machinery: how it runs.
    """

    def __init__(self, vae: Any, machinery: Machinery) -> None:
        self._vae, self._machinery = vae, machinery
        self._part = self._build()

    def __call__(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """As `AutoencoderKL.decode`: scaled-back latents [B, C, h, w] to pixels [B, 3, H, W]."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        pixels = self._part(latents=z)
        if self._vae.dtype == torch.float16 and not bool(pixels.isfinite().all()):
            self._vae.float()
            self._part = self._build()
            pixels = self._part(latents=z)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    def _build(self) -> FastPart:
        return FastPart("VAE", self._decode, self._vae.dtype, self._machinery)

    def _decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = type(self._vae).decode(self._vae, latents, return_dict=False)[0]
        return pixels


class FastText:
    """`forward` of a CLIP text encoder; what a pipeline seldom asks for goes to the encoder's own.

    Args:
        encoder: `CLIPTextModel`, from token ids to states.
        machinery: how it runs.
    """

    def __init__(self, encoder: Any, machinery: Machinery) -> None:
        self._encoder = encoder
        # Not compiled: it is short next to the rest.
        self._part = FastPart(
            "text encoder", self._encode, encoder.dtype, machinery, can_compile=False
        )

    def __call__(self, input_ids: Tensor, attention_mask: Any = None, **asked: Any) -> Any:
        """Token ids [B, T] to states [B, T, D], the first of the outputs."""
        if attention_mask is not None or asked:
            return self._plain(input_ids, attention_mask=attention_mask, **asked)
        return (self._part(input_ids=input_ids),)

    def _encode(self, input_ids: Tensor) -> Tensor:
        states: Tensor = self._plain(input_ids)[0]
        return states

    def _plain(self, *args: Any, **asked: Any) -> Any:
        return type(self._encoder).forward(self._encoder, *args, **asked)
