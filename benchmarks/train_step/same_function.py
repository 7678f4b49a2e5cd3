"""Whether a trainer's U-Net is diffusers' own: its loss and the gradient of every weight.

Held to diffusers' U-Net in float32, with the same fresh weights and inputs. How far a weight's
gradient may be off is not one number: where large terms cancel, as in the biases of some norms,
bfloat16 alone loses a fifth of it. So the yardstick is diffusers' own U-Net in bfloat16.
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.train_step.diffusers_loop import build_plain_unet
from shards.column import Json
from train.diffusion_loss import DiffusionLoss
from train.draws import Draws
from train.objective import Objective

if TYPE_CHECKING:
    from train.trainer import Trainer

_REFERENCE_ROWS = 8  # at a time: activations of float32 are large
_PERTURBATION = 0.1
_LOGVAR = -10.0  # what Stable Diffusion's VAE says of photos


@dataclass(frozen=True)
class Bands:
    """What counts as the same function.

    Args:
        cosine: of all gradients as one vector with the reference's, at least.
        parameter_frac: size of the difference over that of the gradient, for each weight, at most;
        times_diffusers: or at most so many times that of diffusers' own U-Net in bfloat16.
        loss_frac: difference of the mean loss over it, at most.
    """

    cosine: float
    parameter_frac: float
    times_diffusers: float
    loss_frac: float


# diffusers' own in bfloat16, on a CPU: cosine 0.99996 (tiny) and 0.99999 (SD 2 at 16x16 latents),
# single weights off by up to 4% and 23%, losses by 4e-5 and 2e-4.
_LOW = Bands(cosine=0.999, parameter_frac=0.15, times_diffusers=3.0, loss_frac=2e-3)
_FLOAT32 = Bands(cosine=0.999999, parameter_frac=5e-3, times_diffusers=0.0, loss_frac=1e-5)


def is_exact(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a trainer computes in float32; TF32 on a GPU is none."""
    return dtype == torch.float32 and device.type == "cpu"


@dataclass(frozen=True)
class Reference:
    """What diffusers' U-Net makes of fresh weights and inputs, all of it in the host's memory.

    Args:
        seed: of weights and inputs.
        weights: float32, exact in bfloat16, none of them zero, by diffusers' names.
        moments: [B, 2C, h, w] float16.
        states: [B, T, D] float16.
        draws: of B samples.
        loss: mean over the samples.
        gradients: of that loss, float32, by diffusers' names.
        bf16_frac: how far diffusers' own U-Net in bfloat16 is off, by name.
    """

    seed: int
    weights: dict[str, Tensor]
    moments: Tensor
    states: Tensor
    draws: Draws
    loss: float
    gradients: dict[str, Tensor]
    bf16_frac: dict[str, float]


def build_reference(trainer: Trainer, seed: int) -> Reference:
    """For trainers of this one's U-Net, objective and batch size.

    Args:
        trainer: says what is computed; its own weights are not looked at.
        seed: of weights and inputs.

    Raises:
        RuntimeError: among others, it does not fit.
    """
    config, batches, device = trainer.config, trainer.batches, trainer.device
    generator = torch.Generator(device).manual_seed(seed)
    unet: Any = build_plain_unet(config, batches.latent_shape[-1]).to(device)
    _perturb(unet, generator)
    weights = {name: p.detach().cpu() for name, p in unet.named_parameters()}
    module = DiffusionLoss(
        unet,
        Objective(config, device),
        torch.from_numpy(batches.null_states).to(device),
        batches.scaling_factor,
        channels_last=False,
    )
    inputs = _draw_inputs(trainer, generator, module.objective.num_train_timesteps)
    with full_float32():
        loss, gradients = _loss_and_gradients(module, inputs)
    torch.nn.Module.to(unet, torch.bfloat16)  # a diffusers model's own warns about parts it lacks
    module.dtype = torch.bfloat16
    _, low_gradients = _loss_and_gradients(module, inputs)
    found = {name: Deviation.of(low_gradients[name], g) for name, g in gradients.items()}
    moments, states, draws = inputs
    return Reference(
        seed=seed,
        weights=weights,
        moments=moments.cpu(),
        states=states.cpu(),
        draws=Draws(**{name: tensor.cpu() for name, tensor in vars(draws).items()}),
        loss=loss,
        gradients={name: gradient.cpu() for name, gradient in gradients.items()},
        bf16_frac={name: deviation.frac for name, deviation in found.items()},
    )


def compare(trainer: Trainer, reference: Reference, *, poison: bool) -> Json:
    """Hold one forward and backward pass of a trainer to the reference; its weights are replaced.

    Args:
        trainer: of the reference's batch size, in one micro-batch.
        reference: see `build_reference`.
        poison: memory that nothing has written to is NaN, and deterministic algorithms run.

    Returns:
        `problems`, a text for each bound that does not hold, with the figures and the bounds.
    """
    model, device = trainer.model, trainer.device
    assert len(trainer.positions) == trainer.micro_batch_size == len(reference.moments)
    model.weights.load(reference.weights)
    with _poisoned() if poison else nullcontext():
        losses, gradients = gradients_of(
            trainer,
            reference.moments.to(device),
            reference.states.to(device),
            Draws(**{name: tensor.to(device) for name, tensor in vars(reference.draws).items()}),
        )
    assert gradients.keys() == reference.gradients.keys(), "the names are diffusers'"
    found = {name: Deviation.of(g, reference.gradients[name]) for name, g in gradients.items()}
    bands = _FLOAT32 if is_exact(model.precision.dtype, device) else _LOW
    return {
        "seed": reference.seed,
        "batch_size": len(losses),
        "poisoned": poison,
        **_judge(losses.mean().item(), found, reference, bands),
    }


def gradients_of(
    trainer: Trainer, moments: Tensor, states: Tensor, draws: Draws
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses [B] and the gradients as the trainer's update gets them, by diffusers' names."""
    model = trainer.model
    losses, accumulated = model.backward(moments, states, draws)
    gradients = model.weights.collect_gradients(
        accumulated=accumulated, in_float32=not model.update.is_fused
    )
    return losses, dict(zip(model.weights.tensors, gradients, strict=True))


# The figures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deviation:
    """How far a gradient is off: sums over its elements, in float64."""

    product: float
    square: float
    reference_square: float
    difference_square: float

    @classmethod
    def of(cls, gradient: Tensor, reference: Tensor) -> Deviation:
        """Of two tensors of one shape, on any devices."""
        own, other = gradient.double(), reference.to(gradient.device).double()
        terms = (own * other, own.square(), other.square(), (own - other).square())
        return cls(*torch.stack([term.sum() for term in terms]).tolist())

    @property
    def frac(self) -> float:
        """Size of the difference over that of the reference; infinite if it is not finite."""
        frac = (self.difference_square / (self.reference_square or math.nan)) ** 0.5
        return frac if math.isfinite(frac) else math.inf

    @property
    def cosine(self) -> float | None:
        """Of the two; None where there is none."""
        size = (self.square * self.reference_square) ** 0.5
        return self.product / size if math.isfinite(size) and size else None

    def __add__(self, other: Deviation) -> Deviation:
        """Of both gradients as one vector."""
        return Deviation(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def _judge(loss: float, found: dict[str, Deviation], reference: Reference, bands: Bands) -> Json:
    """The figures, the bounds, and what of them does not hold; what is not finite never does."""
    allowed = {
        name: max(bands.parameter_frac, bands.times_diffusers * frac)
        for name, frac in reference.bf16_frac.items()
    }
    loss_frac = abs(loss / reference.loss - 1)
    cosine = functools.reduce(operator.add, found.values()).cosine
    worst = max(found, key=lambda name: found[name].frac / allowed[name])
    problems = [
        f"gradient of {name} off by {deviation.frac:.1%} of its size, at most {allowed[name]:.1%}"
        for name, deviation in found.items()
        if not deviation.frac <= allowed[name]
    ]
    if cosine is None or not cosine > bands.cosine:
        problems.insert(0, f"cosine of all gradients {cosine}, wanted over {bands.cosine}")
    if not loss_frac <= bands.loss_frac:
        problems.insert(0, f"loss {loss:.6g}, in float32 {reference.loss:.6g}")
    return {
        "loss_frac": finite(loss_frac),
        "cosine": cosine,
        "worst_parameter": worst,
        "worst_parameter_frac": finite(found[worst].frac),
        "worst_parameter_cosine": found[worst].cosine,
        "worst_parameter_allowed_frac": finite(allowed[worst]),
        "bands": asdict(bands),
        "problems": problems,
    }


def finite(figure: float) -> float | None:
    """As JSON has it: there is no word for what is not finite."""
    return figure if math.isfinite(figure) else None


# The reference ------------------------------------------------------------------------------------


@torch.no_grad()
def _perturb(unet: torch.nn.Module, generator: torch.Generator) -> None:
    """Fresh weights: none is 0 or 1, as those of norms are at first, and bfloat16 has them all."""
    for parameter in unet.parameters():
        size = parameter.std() if parameter.dim() > 1 else 1.0
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        parameter.add_(_PERTURBATION * size * noise)
        parameter.copy_(parameter.bfloat16())


def _draw_inputs(
    trainer: Trainer, generator: torch.Generator, num_train_timesteps: int
) -> tuple[Tensor, Tensor, Draws]:
    batches, batch_size = trainer.batches, trainer.micro_batch_size
    shape = (batch_size, *batches.latent_shape)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    logvar = _LOGVAR + normal(*shape)
    moments = torch.cat([normal(*shape) / batches.scaling_factor, logvar], dim=1).half()
    states = normal(batch_size, *batches.null_states.shape).half()
    timesteps = torch.randint(
        num_train_timesteps, (batch_size,), generator=generator, device=generator.device
    )
    draws = Draws(
        posterior_noise=normal(*shape),
        noise=normal(*shape),
        timesteps=timesteps,
        drop_caption=normal(batch_size) > 1,  # of one in six
    )
    return moments, states, draws


def _loss_and_gradients(
    module: DiffusionLoss, inputs: tuple[Tensor, Tensor, Draws]
) -> tuple[float, dict[str, Tensor]]:
    """Of the mean over all samples, a few at a time."""
    moments, states, draws = inputs
    total = 0.0
    for start in range(0, len(moments), _REFERENCE_ROWS):
        rows = slice(start, start + _REFERENCE_ROWS)
        drawn = {name: tensor[rows] for name, tensor in vars(draws).items()}
        loss = module(moments[rows], states[rows], **drawn).sum() / len(moments)
        loss.backward()
        total += loss.item()
    gradients = {}
    for name, parameter in module.unet.named_parameters():
        assert parameter.grad is not None, f"{name} has no part in the loss"
        gradients[name], parameter.grad = parameter.grad, None
    return total, gradients


@contextmanager
def full_float32() -> Iterator[None]:
    """Neither matrix products nor convolutions take TF32."""
    precision = torch.get_float32_matmul_precision()
    allowed = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory is full of NaN as torch hands it out: it offers that for deterministic algorithms."""
    settings: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an operator has no deterministic algorithm
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]
