"""One update of the weights: clip, AdamW, average. All of it on the device, without a host sync.

Clipping and loss scaling cost no pass over the gradients: AdamW's fused kernel divides by
`grad_scale` as it reads them, and changes nothing where `found_inf` is set.
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
    ) -> None:
        self._config, self._weights = config, weights
        self.optimizer: Any = torch.optim.AdamW(
            list(weights.tensors.values()),
            betas=config.adam_betas,
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.average: WeightAverage | None = None
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
        grad_norm, left_out = self.update_weights(step, loss, accumulated=accumulated)
        self.move_average(step + 1)
        return grad_norm, left_out

    @torch.no_grad()
    def update_weights(
        self, step: int, loss: Tensor, *, accumulated: bool
    ) -> tuple[Tensor, Tensor]:
        """The same without the average."""
        gradients = self._weights.collect_gradients(accumulated=accumulated)
        scaled_norm = self._weights.norm_of(gradients)
        is_finite = scaled_norm.isfinite()
        grad_norm = scaled_norm / self.loss_scale if self._scales_loss else scaled_norm
        self._note_broken(step, is_finite, loss)
        left_out = ~is_finite | (self.broken_step >= 0) if not self._scales_loss else ~is_finite
        self.optimizer.found_inf = left_out.float()
        self.optimizer.grad_scale = self._divisor(grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._config.learning_rate_at(step)
        self.optimizer.step()
        self._weights.publish()
        self._weights.clear_gradients()
        if self._scales_loss:
            self._adapt_scale(is_finite)
        return grad_norm, left_out

    def _divisor(self, grad_norm: Tensor) -> Tensor:
        """What the gradients are divided by: the loss scale, and what they exceed the limit by."""
        limit = self._config.max_grad_norm
        excess = (grad_norm / limit).clamp(min=1.0) if limit else torch.ones_like(grad_norm)
        return excess * self.loss_scale if self._scales_loss else excess

    def _note_broken(self, step: int, is_finite: Tensor, loss: Tensor) -> None:
        broken = ~is_finite
        if self._scales_loss:
            broken = (broken & (self.loss_scale <= _MIN_SCALE)) | ~loss.isfinite()
        first = broken & (self.broken_step < 0)
        self.broken_step = torch.where(first, step, self.broken_step)

    def _adapt_scale(self, is_finite: Tensor) -> None:
        """Halve after an overflow, double after 2,000 steps without one."""
        good_steps = (self.good_steps + 1) * is_finite
        grows = good_steps >= _GROWTH_STEPS
        factor = torch.where(is_finite, torch.where(grows, 2.0, 1.0), 0.5)
        self.loss_scale = (self.loss_scale * factor).clamp(min=_MIN_SCALE)
        self.good_steps = good_steps * ~grows

    @torch.no_grad()
    def move_average(self, steps_done: int) -> None:
        """Start the average, or move it, where that is due after so many updates."""
        if self.average is None:
            if self.has_average(steps_done):
                self.average = self.start_average()
        elif steps_done % self._config.ema_every == 0:
            self.average.update()

    def has_average(self, steps_done: int) -> bool:
        """Whether the weights are averaged once so many updates are done."""
        return bool(self._config.ema_decay) and steps_done >= self._config.ema_start_step

    def start_average(self) -> WeightAverage:
        """An average that begins as a copy of the weights."""
        return WeightAverage(self._weights.tensors, self._config.ema_decay**self._config.ema_every)
