"""One update of the weights: clip, AdamW, average. All of it on the device, without a host sync.

What changes from step to step is in tensors that stay in their place, so that a recorded step can
be replayed. Clipping and loss scaling cost no pass over the gradients: AdamW's kernels divide as
they read them, and change nothing where a gradient was not finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.config import TrainConfig
from train.ema import WeightAverage
from train.master_weights import MasterWeights
from train.precision import Precision

_FIRST_SCALE, _MIN_SCALE, _GROWTH_STEPS = 65536.0, 1.0, 2000  # as torch.amp.GradScaler's


class Update:
    """The optimizer with what belongs around it.

    Once a gradient was not finite no update changes anything, so the weights stay those before that
    step until the host looks (`broken_step`). In float16 an overflow is no accident: the update is
    left out and the loss scale halved, and only what is not finite at scale 1, or a loss that is
    not, counts as broken.

    Args:
        config: the run.
        weights: what is updated.
        precision: whether the loss is scaled.
        device: of the weights.
        fused: rounding and averaging the weights is part of AdamW's pass over them
            (`train.fused.adamw`).

    Attributes:
        average: of the weights, once it has started.
        broken_step: [] int64, the first step that was not finite; -1 while there is none.
    """

    def __init__(
        self,
        config: TrainConfig,
        weights: MasterWeights,
        precision: Precision,
        device: torch.device,
        *,
        fused: bool = False,
    ) -> None:
        self._config, self._weights, self.is_fused = config, weights, fused
        self.optimizer: Any = _build_optimizer(config, weights, device, fused=fused)
        self.average: WeightAverage | None = None
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        # What torch's kernels read: on a CPU they take a number of double precision.
        lr_dtype = torch.float64 if device.type == "cpu" and not fused else torch.float32
        self._learning_rate = torch.zeros((), dtype=lr_dtype, device=device)
        self.broken_step = torch.full((), -1, device=device)
        self._scales_loss = precision.scales_loss
        self.loss_scale = torch.full((), _FIRST_SCALE, device=device)
        self.good_steps = torch.zeros((), device=device)  # since the scale last changed

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to go backward from."""
        return loss * self.loss_scale if self._scales_loss else loss

    def apply(self, step: int, loss: Tensor, *, accumulated: bool) -> tuple[Tensor, Tensor]:
        """Update the weights from the gradients of one step, then their average.

        Args:
            step: its number, from 0.
            loss: this process's.
            accumulated: see `MasterWeights.collect_gradients`.

        Returns:
            the gradients' norm before clipping, and whether the update was left out.
        """
        self.begin(step)
        moves = self.moves_average(step)
        found = self.advance(loss, accumulated=accumulated, moves_average=moves)
        self.end(step)
        return found

    def begin(self, step: int) -> None:
        """Tell the device which step is coming, and its learning rate."""
        self._step.fill_(step)
        self._learning_rate.fill_(self._config.learning_rate_at(step))

    @torch.no_grad()
    def advance(
        self, loss: Tensor, *, accumulated: bool, moves_average: bool
    ) -> tuple[Tensor, Tensor]:
        """All of an update that is the device's work; see `apply`.

        Args:
            loss: as there.
            accumulated: as there.
            moves_average: towards the updated weights.
        """
        gradients = self._weights.collect_gradients(
            accumulated=accumulated, in_float32=not self.is_fused
        )
        scaled_norm = self._weights.norm_of(gradients)
        is_finite = scaled_norm.isfinite()
        grad_norm = scaled_norm / self.loss_scale if self._scales_loss else scaled_norm
        self._note_broken(is_finite, loss)
        left_out = ~is_finite | (self.broken_step >= 0)
        average = self.average if moves_average else None
        divisor = self._divisor(grad_norm)
        if self.is_fused:
            self._pass_once(gradients, divisor, left_out.float(), average)
        else:
            self._pass_by_pass(gradients, divisor, left_out.float(), average)
        if self._scales_loss:
            self._adapt_scale(is_finite)
        return grad_norm, left_out

    def _pass_once(
        self,
        gradients: list[Tensor],
        divisor: Tensor,
        left_out: Tensor,
        average: WeightAverage | None,
    ) -> None:
        self.optimizer.update(
            gradients,
            learning_rate=self._learning_rate,
            divisor=divisor,
            left_out=left_out,
            averages=list(average.weights.values()) if average else None,
            average_weight=1 - average.decay if average else 0.0,
        )

    def _pass_by_pass(
        self,
        gradients: list[Tensor],
        divisor: Tensor,
        left_out: Tensor,
        average: WeightAverage | None,
    ) -> None:
        (group,) = self.optimizer.param_groups
        group["lr"] = self._learning_rate  # each time: whoever restores a state has copied it
        self.optimizer.grad_scale, self.optimizer.found_inf = divisor, left_out
        for master, gradient in zip(group["params"], gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._weights.publish()
        if average:
            average.update()

    def _divisor(self, grad_norm: Tensor) -> Tensor:
        """What the gradients are divided by: the loss scale, and what they exceed the limit by."""
        limit = self._config.max_grad_norm
        excess = (grad_norm / limit).clamp(min=1.0) if limit else torch.ones_like(grad_norm)
        return excess * self.loss_scale if self._scales_loss else excess

    def _note_broken(self, is_finite: Tensor, loss: Tensor) -> None:
        broken = ~is_finite
        if self._scales_loss:
            broken = (broken & (self.loss_scale <= _MIN_SCALE)) | ~loss.isfinite()
        first = broken & (self.broken_step < 0)
        self.broken_step.copy_(torch.where(first, self._step, self.broken_step))

    def _adapt_scale(self, is_finite: Tensor) -> None:
        """Halve after an overflow, double after 2,000 steps without one."""
        good_steps = (self.good_steps + 1) * is_finite
        grows = good_steps >= _GROWTH_STEPS
        factor = torch.where(is_finite, torch.where(grows, 2.0, 1.0), 0.5)
        self.loss_scale.copy_((self.loss_scale * factor).clamp(min=_MIN_SCALE))
        self.good_steps.copy_(good_steps * ~grows)

    def moves_average(self, step: int) -> bool:
        """Whether an average that has started moves in this step."""
        return self.average is not None and (step + 1) % self._config.ema_every == 0

    def end(self, step: int) -> None:
        """Start the average where that is due after this step."""
        if self.average is None and self.has_average(step + 1):
            self.average = self.start_average()

    def has_average(self, steps_done: int) -> bool:
        """Whether the weights are averaged once so many updates are done."""
        return bool(self._config.ema_decay) and steps_done >= self._config.ema_start_step

    def start_average(self) -> WeightAverage:
        """An average that begins as a copy of the weights."""
        return WeightAverage(self._weights.tensors, self._config.ema_decay**self._config.ema_every)


def _build_optimizer(
    config: TrainConfig, weights: MasterWeights, device: torch.device, *, fused: bool
) -> Any:
    masters = list(weights.tensors.values())
    options: dict[str, Any] = {
        "betas": config.adam_betas,
        "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
    }
    if fused:
        from train.fused.adamw import FusedAdamW

        return FusedAdamW(masters, published=weights.published, **options)
    return torch.optim.AdamW(masters, fused=True, capturable=device.type == "cuda", **options)
