"""The training loop: latents in, a U-Net out. `train(config, batches)` is all of stage 2.

The loop never sees an encoder or a pixel. It takes a `BatchSource`; reading latent shards and
encoding online differ by that argument alone.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor

from shards.batch import BatchSource, LatentBatch
from shards.canonical import canonical_json
from shards.errors import UserError
from shards.order import choose_partitions, positions_of_rank
from shards.stop import StopOnSignal
from shards.storage import write_text_whole
from train.attention import apply_attention
from train.checkpoint import (
    checkpoints_of,
    load_weights,
    optimizer_tensors,
    read_state,
    restore_optimizer,
    save_checkpoint,
    save_scheduler,
    save_unet,
)
from train.config import TrainConfig
from train.draws import Draws, draw
from train.ema import WeightAverage
from train.interval import Interval, log_line
from train.metrics import MetricsLog
from train.objective import Objective, sample_latents
from train.transfer import to_device
from train.unet import build_unet, load_unet_config


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's view of device, processes and precision."""
    precision: str = config.mixed_precision
    if precision == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16" if has_bf16 else "no"
    # Micro-batches are weighed here; a setting of the launcher must not divide the loss once more.
    undivided = GradientAccumulationPlugin(num_steps=1)
    return Accelerator(mixed_precision=precision, gradient_accumulation_plugin=undivided)


def train(
    config: TrainConfig, batches: BatchSource, accelerator: Accelerator | None = None
) -> Trainer:
    """Train to `config.max_steps`, from the newest checkpoint in `config.output_dir` if any.

    Args:
        config: the run.
        batches: where latent batches come from.
        accelerator: made from `config` when not given.

    Raises:
        UserError: the run cannot be continued with this configuration, or its loss is not finite.
    """
    trainer = Trainer(config, batches, accelerator or build_accelerator(config))
    trainer.announce()
    with trainer.signals:
        trainer.run(config.max_steps)
        trainer.finish()
    trainer.close()
    return trainer


class Trainer:
    """A run in progress.

    Attributes:
        step: updates done.
        unet: the raw module, not wrapped for data parallelism.
        average: its moving average, once that has started.
        stopped: a signal ended the run before its last step.
    """

    def __init__(self, config: TrainConfig, batches: BatchSource, accelerator: Accelerator) -> None:
        self.config, self.batches, self.accelerator = config, batches, accelerator
        self.run_dir = Path(config.output_dir)
        self.device: torch.device = accelerator.device
        self.positions = positions_of_rank(
            config.global_batch_size,
            choose_partitions(config.global_batch_size, config.num_partitions),
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.micro_batch_size = _micro_batch_size(config.micro_batch_size, len(self.positions))
        self.objective = Objective(config.prediction_type, config.min_snr_gamma, self.device)
        self.null_states = torch.from_numpy(batches.null_states).to(self.device).float()
        unet_config = load_unet_config(config.unet)
        self.unet = build_unet(unet_config, batches.latent_shape[-1], config.seed).to(self.device)
        self.attention = apply_attention(self.unet, config.attention, self.device)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(),
            betas=config.adam_betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.average: WeightAverage | None = None
        self.step = 0
        self.stopped = False
        self.signals = StopOnSignal()
        self._interval = Interval(self.step, self.device)
        self._saved_step = -1
        self._resume()
        self._model = accelerator.prepare(self.unet)
        self._source: Iterator[LatentBatch] | None = None
        if accelerator.is_main_process:
            record = {"settings": asdict(config), "attention": self.attention, **self._identity()}
            write_text_whole(self.run_dir / "config.json", canonical_json(record))
            self._metrics = MetricsLog(self.run_dir / "metrics.jsonl", self.step)

    # The loop ------------------------------------------------------------------------------------

    def run(self, until: int) -> None:
        """Train until `until` updates are done or a signal asks for a stop."""
        if self._source is None:
            self._source = self.batches.iter_batches(self.step, self.positions)
        self._interval.start_clock(self.step)
        while self.step < until and not self.stopped:
            with self._interval.waiting():
                batch = next(self._source)
            self._train_step(batch)
            self.step += 1
            if self.step % self.config.log_every == 0 or self.step == until:
                self._log()
            elif self.accelerator.num_processes == 1:
                self.stopped = self.signals.requested
            if self.step % self.config.checkpoint_every == 0:
                self.save()

    def _train_step(self, batch: LatentBatch) -> None:
        """One update from one rank's share of the global batch."""
        assert batch.step == self.step
        assert len(batch.samples) == len(self.positions)
        moments = to_device(batch.moments, self.device)
        states = to_device(batch.states, self.device)
        draws = draw(
            seed=self.config.seed,
            step=self.step,
            positions=self.positions,
            global_batch_size=self.config.global_batch_size,
            latent_shape=self.batches.latent_shape,
            num_train_timesteps=self.objective.num_train_timesteps,
            caption_drop_prob=self.config.caption_drop_prob,
            device=self.device,
        )
        num_rows = len(self.positions)
        for start in range(0, num_rows, self.micro_batch_size):
            rows = slice(start, start + self.micro_batch_size)
            last = rows.stop == num_rows
            with nullcontext() if last else self.accelerator.no_sync(self._model):
                loss = self._loss(moments[rows], states[rows], draws, rows)
                loss = loss * (self.micro_batch_size / num_rows)
                self.accelerator.backward(loss)
            self._interval.add_loss(loss)
        self._update()

    def _loss(self, moments: Tensor, states: Tensor, draws: Draws, rows: slice) -> Tensor:
        """Forward pass and loss of one micro-batch; the body of every diffusion trainer."""
        noise, timesteps = draws.noise[rows], draws.timesteps[rows]
        latents = sample_latents(moments, draws.posterior_noise[rows], self.batches.scaling_factor)
        noisy_latents = self.objective.add_noise(latents, noise, timesteps)
        noisy_latents = noisy_latents.contiguous(memory_format=torch.channels_last)
        dropped = draws.drop_caption[rows].view(-1, 1, 1)
        encoder_hidden_states = torch.where(dropped, self.null_states, states.float())
        model_pred = self._model(noisy_latents, timesteps, encoder_hidden_states).sample
        target = self.objective.target(latents, noise, timesteps)
        return self.objective.loss(model_pred, target, timesteps)

    def _update(self) -> None:
        """Clip, optimizer, moving average."""
        config = self.config
        limit = config.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), limit)
        self._interval.grad_norm_sum += grad_norm
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        elif self._has_average(self.step + 1):
            self.average = WeightAverage(self.unet, config.ema_decay)

    def _log(self) -> None:
        """Write a row and open the next interval; the ranks agree on a stop here."""
        loss, grad_norm, stop_frac = self._read_sums()
        row = self._interval.close(self.step, loss, grad_norm, self.config.global_batch_size)
        row["epoch"] = round(self.batches.epoch_at(self.step), 4)
        row["train/learning_rate"] = self.config.learning_rate_at(self.step - 1)
        if self.accelerator.is_main_process:
            self._metrics.write(row)
        self.accelerator.print(log_line(row, self.config.max_steps), flush=True)
        self.stopped = stop_frac > 0
        self._interval = Interval(self.step, self.device)

    def _read_sums(self) -> tuple[float, float, float]:
        """The interval's losses and gradient norms, and the share of ranks that a signal reached.

        The one place where the host waits for the device.
        """
        stop = torch.tensor(float(self.signals.requested), device=self.device)
        sums = torch.stack([self._interval.loss_sum, self._interval.grad_norm_sum, stop])
        loss, grad_norm, stop_frac = self.accelerator.reduce(sums, "mean").tolist()
        return loss, grad_norm, stop_frac

    def announce(self) -> None:
        """Say what is about to run, with the arithmetic of the batch."""
        config, say = self.config, self.accelerator.print
        accumulated = len(self.positions) // self.micro_batch_size
        num_parameters = sum(p.numel() for p in self.unet.parameters())
        say(
            f"U-Net {config.unet}: {num_parameters:,} parameters | {self.device} | "
            f"precision {self.accelerator.mixed_precision} | attention {self.attention}"
        )
        say(
            f"global batch {config.global_batch_size} = micro-batch {self.micro_batch_size} x "
            f"{accumulated} accumulated x {self.accelerator.num_processes} processes | "
            f"{config.prediction_type}"
        )
        if self.step >= config.max_steps:
            say(f"{self.run_dir} is at step {self.step} of {config.max_steps} already")
        elif self.step:
            say(f"continuing {self.run_dir} at step {self.step}")

    # Persistence ---------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step.

        Raises:
            UserError: the weights are not to be trusted: a gradient was not finite.
        """
        loss, grad_norm, _ = self._read_sums()
        if not math.isfinite(loss + grad_norm):
            raise UserError(
                self.run_dir, f"not saved: gradients before step {self.step} not finite"
            )
        interval = {
            "first_step": self._interval.first_step,
            "loss_sum": loss,
            "grad_norm_sum": grad_norm,
        }
        if self.accelerator.is_main_process:
            save_checkpoint(
                self.run_dir,
                step=self.step,
                state={**self._identity(), "interval": interval},
                prediction_type=self.config.prediction_type,
                unet_config=dict(self.unet.config),
                weights=self.unet.state_dict(),
                average=self.average.weights if self.average else None,
                optimizer=optimizer_tensors(self.optimizer, self._parameter_names()),
                keep=self.config.keep_checkpoints,
            )
        self._saved_step = self.step
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Checkpoint the last step; export the result once the run is complete."""
        if self._saved_step != self.step:
            self.save()
        if self.step < self.config.max_steps:
            self.accelerator.print(f"stopped at step {self.step}; the same command continues")
        elif self.accelerator.is_main_process:
            self._export()

    def close(self) -> None:
        """Stop what reads ahead."""
        if isinstance(self._source, Generator):
            self._source.close()

    def _export(self) -> None:
        """Make the run folder half a diffusers pipeline: `unet/` and `scheduler/`.

        The other half is the model folder: `StableDiffusionPipeline.from_pretrained(model_folder,
        unet=UNet2DConditionModel.from_pretrained(run, subfolder="unet"))`.
        """
        weights = self.average.weights if self.average else self.unet.state_dict()
        save_unet(self.run_dir / "unet", dict(self.unet.config), weights)
        save_scheduler(self.run_dir / "scheduler", self.config.prediction_type)

    def _resume(self) -> None:
        """Continue from the newest checkpoint of the run, exactly."""
        checkpoints = checkpoints_of(self.run_dir)
        if not checkpoints:
            return
        newest = checkpoints[-1]
        state = read_state(newest)
        self._refuse_another_run(newest, state)
        self.unet.load_state_dict(load_weights(newest, "unet"))
        tensors = load_weights(newest, "optimizer")
        restore_optimizer(self.optimizer, self._parameter_names(), tensors)
        self.step = self._saved_step = state["step"]
        self._interval.restore(**state["interval"])
        if self._has_average(self.step):
            self.average = WeightAverage(self.unet, self.config.ema_decay)
            self.average.load(load_weights(newest, "unet_ema"))

    def _has_average(self, step: int) -> bool:
        """Whether the weights are averaged once so many updates are done."""
        return bool(self.config.ema_decay) and step >= self.config.ema_start_step

    def _refuse_another_run(self, checkpoint: Path, state: dict[str, Any]) -> None:
        before, now = state["config"], self._identity()["config"]
        changed = [
            f"{name} {before.get(name)} -> {now.get(name)}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if not changed and state["batches"] != self.batches.identity:
            changed = ["the dataset has other columns or shards"]
        if changed:
            raise UserError(
                checkpoint,
                f"belongs to another run: {'; '.join(changed)}",
                wanted="the settings that the run was started with",
                remedy="another --output-dir",
            )

    def _identity(self) -> dict[str, Any]:
        config = self.config.defining_fields()
        unet = load_unet_config(config.pop("unet"))  # what it says, not where it is
        config |= {f"unet.{name}": value for name, value in unet.items()}
        config["mixed_precision"] = self.accelerator.mixed_precision  # what `auto` came to
        return {"config": config, "batches": self.batches.identity}

    def _parameter_names(self) -> list[str]:
        return [name for name, _ in self.unet.named_parameters()]


def _micro_batch_size(requested: int, share: int) -> int:
    """Rows per forward pass.

    Raises:
        UserError: they do not divide a process's share; names the nearest sizes that do.
    """
    if requested and share % requested:
        divisors = [size for size in range(1, share + 1) if share % size == 0]
        nearest = sorted(sorted(divisors, key=lambda size: abs(size - requested))[:2])
        raise UserError(
            "--micro-batch-size",
            f"{requested} does not divide a process's share of {share}",
            remedy=f"--micro-batch-size {' or '.join(map(str, nearest))}",
        )
    return requested or share
