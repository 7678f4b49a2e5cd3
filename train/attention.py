"""Which kernel each attention of the U-Net runs: tried at the start, pinned, said in the log.

torch picks one kernel by rules that know neither this GPU nor this shape, and diffusers takes some
settings without a word and runs something else. So every layer shape is tried here, forward and
backward, and the operators that are dispatched say what ran.
"""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shards.errors import UserError
from train.attention_processors import build_processor, is_batched
from train.config import AttentionChoice

_OPERATORS = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_flash_attention_for_cpu": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_fused_attention_overrideable": "overrideable",
    "_flash_attention_forward": "xformers",  # it calls torch's kernels below their front
    "_efficient_attention_forward": "xformers",
}
_CHOICES = ("sdpa", "flash", "cudnn", "xformers", "math")
# What `auto` measures; math keeps a [tokens, tokens] matrix per head for the backward pass.
_CANDIDATES = ("flash", "cudnn", "efficient", "xformers")
# Kernels within this of each other are alike: the earlier candidate stays, so that noise in the
# measurement does not change a run's rounding from one start to the next.
_CLEARLY_FASTER = 0.95
_BATCH_SIZE = 8
_WARM_UP_RUNS, _TIMED_RUNS = 3, 9
_HEAD_START_CYCLES = 10_000_000  # some 5 ms, in which the host gets ahead of the device

Run = Callable[[], None]


class KernelUnavailableError(Exception):
    """A kernel does not run a layer here, or something else ran in its place."""


def apply_attention(
    unet: Any,
    choice: AttentionChoice,
    *,
    device: torch.device,
    dtype: torch.dtype,
    latent_shape: tuple[int, int, int],
    num_tokens: int,
    batch_size: int = _BATCH_SIZE,
) -> str:
    """Give the U-Net's attention layers the processors that run `choice`.

    `auto` measures on a GPU and pins the fastest kernel of each shape; another start may pick
    another kernel of nearly the same speed, whose rounding differs. Elsewhere it is torch's own
    choice without measuring: runs stay the same to the bit.

    Args:
        unet: diffusers U-Net, on `device`, its projections batched or not; its weights may be
            wider than `dtype` (autocast).
        choice: see `TrainConfig.attention`; `sdpa` leaves the choice of kernel to torch.
        device: where it runs.
        dtype: what it computes in.
        latent_shape: [C, h, w].
        num_tokens: of the text states.
        batch_size: samples of the measurement; which kernel is fastest depends on it.

    Returns:
        what runs, as the log says it: `sdpa flash`, `xformers`, `flash; 64x64 self cudnn`.

    Raises:
        UserError: `choice` does not run here.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        measured = choice == "auto" and device.type == "cuda"
        rows = batch_size if measured else 1  # what runs at all does not depend on it
        shapes = find_layers(unet, latent_shape, num_tokens)
        trials = [Trial(shape, device, dtype, rows) for shape in shapes]
        if measured:
            return describe(pin_fastest(trials, _CANDIDATES, milliseconds_on_gpu))
        wanted = "sdpa" if choice == "auto" else choice
        try:
            ran = use(trials, wanted)
        except KernelUnavailableError as error:
            others = [other for other in _CHOICES if other != wanted and _runs(trials, other)]
            raise UserError(
                "--attention",
                f"{wanted} does not run here: {error}",
                remedy=f"--attention {' or '.join(others)}",
            ) from None
    return f"sdpa {describe(ran)}" if wanted == "sdpa" else describe(ran)


def describe(kernels: dict[str, str]) -> str:
    """`{shape: kernel}` as the most common kernel and then the shapes that differ."""
    if not kernels:
        return "none"
    ((common, _),) = Counter(kernels.values()).most_common(1)
    others = [f"{shape} {kernel}" for shape, kernel in kernels.items() if kernel != common]
    return "; ".join([common, *([", ".join(others)] if others else [])])


# The layers ---------------------------------------------------------------------------------------


@dataclass
class LayerShape:
    """The attention layers of one shape; equal shapes run equally fast.

    Args:
        name: as the log says it: `64x64 self`.
        hidden_shape: [tokens, channels] of what the layer is called with.
        context_shape: [tokens, channels] of what it attends to; None for self-attention.
        layers: diffusers `Attention` modules.
        context_widths: what the context is cut into along its channels, where it is the keys and
            values of all layers (`train.projections`).
    """

    name: str
    hidden_shape: torch.Size
    context_shape: torch.Size | None
    layers: list[Any] = field(default_factory=list)
    context_widths: tuple[int, ...] | None = None


def find_layers(unet: Any, latent_shape: tuple[int, int, int], num_tokens: int) -> list[LayerShape]:
    """The U-Net's attention layers by shape, in the order in which they are called.

    Found by a forward pass of fake tensors, which compute nothing: any architecture will do.
    """
    from diffusers.models.attention_processor import Attention
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[tuple[object, ...], LayerShape] = {}

    def note(layer: Any, inputs: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        hidden_shape = inputs[0].shape[1:]
        context_shape, widths = _context_of(keywords.get("encoder_hidden_states"))
        key = (hidden_shape, context_shape, layer.heads, is_batched(layer))
        name = _name(latent_shape, hidden_shape, context_shape)
        shape = LayerShape(name, hidden_shape, context_shape, context_widths=widths)
        found.setdefault(key, shape).layers.append(layer)

    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    like = next(unet.parameters())
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            sample, timesteps = like.new_empty(1, *latent_shape), like.new_empty(1)
            unet(sample, timesteps, like.new_empty(1, num_tokens, unet.config.cross_attention_dim))
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def _context_of(context: Any) -> tuple[torch.Size | None, tuple[int, ...] | None]:
    """Shape of what a layer attends to, and what it is cut into."""
    if not isinstance(context, tuple):
        return None if context is None else context.shape[1:], None
    widths = tuple(piece.shape[-1] for piece in context)
    return torch.Size((context[0].shape[1], sum(widths))), widths


def _name(
    latent_shape: tuple[int, int, int], hidden_shape: torch.Size, context_shape: torch.Size | None
) -> str:
    _, height, width = latent_shape
    tokens = hidden_shape[0]
    reduction = round((height * width / tokens) ** 0.5)
    kind = "self" if context_shape is None else "cross"
    return f"{-(-height // reduction)}x{-(-width // reduction)} {kind}"


# Trying -------------------------------------------------------------------------------------------


class Trial:
    """Runs the first layer of a shape, forward and backward, on random input.

    Args:
        shape: the layers.
        device: where they run.
        dtype: what they compute in, under autocast where their weights are of another dtype.
        batch_size: samples of the input.
    """

    def __init__(
        self, shape: LayerShape, device: torch.device, dtype: torch.dtype, batch_size: int
    ) -> None:
        self.name, self.layers = shape.name, shape.layers
        self._shape, self._batch_size = shape, batch_size
        self._device, self._dtype = device, dtype

    def __call__(self) -> None:
        """Forward and backward; leaves no gradient anywhere."""
        layer = self.layers[0]
        weights = [weight for weight in layer.parameters() if weight.requires_grad]
        hidden_states = self._random(self._shape.hidden_shape, weights[0].dtype).requires_grad_()
        context, leaves = self._context(weights[0].dtype)
        autocast = self._dtype != weights[0].dtype
        with torch.enable_grad(), torch.autocast(self._device.type, self._dtype, enabled=autocast):
            output = layer(hidden_states, encoder_hidden_states=context)
        torch.autograd.grad(output.float().square().mean(), [hidden_states, *leaves, *weights])

    def _context(self, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
        """What the layer attends to, and what of it wants a gradient."""
        shape = self._shape
        if shape.context_shape is None:
            return None, []
        if shape.context_widths is None:
            return self._random(shape.context_shape, dtype), []
        # The strides are those of the product of all layers; what is other layers' stays unset.
        size = (self._batch_size, *shape.context_shape)
        whole = torch.empty(size, device=self._device, dtype=self._dtype)
        context = whole.split(shape.context_widths, dim=-1)
        leaves = [piece.normal_().requires_grad_() for piece in self.layers[0].to_kv(context)]
        return context, leaves

    def use(self, kernel: str) -> str:
        """Give the layers the processor of `kernel` and see that it runs.

        Returns:
            the kernel that ran; another one only for `sdpa`.

        Raises:
            KernelUnavailableError: it does not run, or another one ran.
        """
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                processor = build_processor(kernel, self.layers[0])
                for layer in self.layers:
                    layer.set_processor(processor)
                ran = kernel_of(self)
            except (ImportError, OSError, RuntimeError, ValueError) as error:
                reason = _reason(error, [str(warning.message) for warning in warned])
                raise KernelUnavailableError(f"{self.name}: {reason}") from None
        if kernel not in ("sdpa", ran):
            raise KernelUnavailableError(f"{self.name}: {ran} ran in its place")
        return ran

    def _random(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.randn(self._batch_size, *shape, device=self._device, dtype=dtype)


def use(trials: Iterable[Trial], kernel: str) -> dict[str, str]:
    """One kernel for all layers; see `Trial.use`.

    Returns:
        what ran, by the name of the shape.
    """
    return {trial.name: trial.use(kernel) for trial in trials}


def _runs(trials: Iterable[Trial], kernel: str) -> bool:
    try:
        return bool(use(trials, kernel))
    except KernelUnavailableError:
        return False


def kernel_of(run: Run) -> str:
    """The attention kernel that `run` dispatches; `math` where it is a row of plain operators."""
    with _KernelWatch() as watch:
        run()
    return "+".join(sorted(watch.kernels)) or "math"


class _KernelWatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace.startswith("xformers"):
            self.kernels.add("xformers")
        elif kernel := _OPERATORS.get(name.partition(".")[0]):
            self.kernels.add(kernel)
        return func(*args, **(kwargs or {}))


def _reason(error: Exception, warned: list[str]) -> str:
    """One line of why a kernel did not run.

    torch says it in warnings before it raises, among others that name what was switched off.
    """
    said = [text for text in warned if "because:" not in text and "disabled" not in text]
    lines = (*said, str(error).strip(), type(error).__name__)
    first_line = next(line for line in lines if line).splitlines()[0]
    return first_line.partition(" (Triggered internally")[0].rstrip(" .")


# Measuring ----------------------------------------------------------------------------------------


def pin_fastest(
    trials: Iterable[Trial], candidates: Sequence[str], time_of: Callable[[Run], float]
) -> dict[str, str]:
    """Measure the candidates shape by shape; each shape keeps the fastest that runs it.

    Args:
        trials: a shape each.
        candidates: kernels, the preferred first; where none of them runs, torch chooses.
        time_of: how long a run takes, in any unit.

    Returns:
        what runs, by the name of the shape.
    """
    return {trial.name: trial.use(_fastest(trial, candidates, time_of)) for trial in trials}


def _fastest(trial: Trial, candidates: Sequence[str], time_of: Callable[[Run], float]) -> str:
    fastest, least = "sdpa", float("inf")
    for kernel in candidates:
        try:
            trial.use(kernel)
        except KernelUnavailableError:
            continue
        time = time_of(trial)
        if time < least * _CLEARLY_FASTER:
            fastest, least = kernel, time
    return fastest


def milliseconds_on_gpu(run: Run) -> float:
    """Median time of a run on the current CUDA device, once it is warm."""
    for _ in range(_WARM_UP_RUNS):
        run()
    times: list[float] = []
    for _ in range(_TIMED_RUNS):
        torch.cuda._sleep(_HEAD_START_CYCLES)  # else the time of a small layer is the host's
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
