"""The training loop: latents in, a U-Net out. `train(config, batches)` is all of stage 2.

The loop never sees an encoder or a pixel. It takes a `BatchSource`; reading latent shards and
encoding online differ by that argument alone.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from accelerate.utils import gather_object as gather_objects

from shards.batch import BatchSource, LatentBatch
from shards.canonical import canonical_json
from shards.errors import UserError
from shards.order import choose_partitions, positions_of_rank
from shards.stop import StopOnSignal
from shards.storage import location, write_text_whole
from train.broken_batch import BrokenBatch, broken_batch_error
from train.checkpoint import (
    checkpoints_of,
    save_scheduler,
    save_unet,
)
from train.checkpoint_writer import CheckpointWriter
from train.compilation import compile_errors
from train.config import TrainConfig
from train.draws import Draws, draw
from train.flops import matmul_flops_per_sec, unet_flops
from train.identity import refuse_another_run, run_identity
from train.interval import Interval, Row, log_line
from train.metrics import MetricsLog
from train.model import Model
from train.observer import Observer
from train.stop_vote import StopVote
from train.trackers import Trackers, accelerator_options
from train.transfer import to_device
from train.unet import load_unet_config

_OTHER_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's view of device, processes and trackers; precision is `train.precision`'s.

    Raises:
        UserError: `accelerate launch` was told to shard by a way of its own, or a tracker is not
            there.
    """
    for name in _OTHER_SHARDING:
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UserError(
                "accelerate launch",
                f"is set to use {name}",
                wanted="plain data parallelism from the launcher",
                remedy="--sharding zero2 here, and accelerate launch without it "
                "(or --config_file of another configuration)",
            )
    return Accelerator(
        mixed_precision="no",
        # Micro-batches are weighed here; a setting of the launcher must not divide once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        **accelerator_options(config.trackers, location(config.output_dir)),
    )


def train(
    config: TrainConfig,
    batches: BatchSource,
    accelerator: Accelerator | None = None,
    observers: Sequence[Observer] = (),
    signals: StopOnSignal | None = None,
) -> Trainer:
    """Train to `config.max_steps`, from the newest checkpoint in `config.output_dir` if any.

    Args:
        config: the run.
        batches: where latent batches come from.
        accelerator: made from `config` when not given.
        observers: look at the run from time to time.
        signals: ask for a stop; entered by the caller when given.

    Raises:
        UserError: the run cannot be continued with this configuration, its loss is not finite, or
            its last checkpoint cannot be written.
    """
    with ExitStack() as held:
        signals = signals or held.enter_context(StopOnSignal(signal.SIGUSR1))
        accelerator = accelerator or build_accelerator(config)
        trainer = Trainer(config, batches, accelerator, observers, signals)
        held.callback(trainer.close)
        trainer.announce()
        held.enter_context(compile_errors())
        trainer.run(config.max_steps)
        trainer.finish()
    return trainer


class Trainer:
    """A run in progress.

    Args:
        config: the run.
        batches: where latent batches come from.
        accelerator: device and processes.
        observers: look at the run from time to time.
        signals: ask for a stop.
        model: what is trained; made from `config` when not given. For benchmarks, which hold
            several sources of batches to each other with one set of weights.

    Attributes:
        step: updates done.
        model: what is trained.
        micro_batch_size: rows of a forward pass.
        run_dir: folder or URL of the run.
        trackers: get what metrics.jsonl gets, and images.
        stopped: a signal ended the run before its last step.
    """

    def __init__(
        self,
        config: TrainConfig,
        batches: BatchSource,
        accelerator: Accelerator,
        observers: Sequence[Observer] = (),
        signals: StopOnSignal | None = None,
        model: Model | None = None,
    ) -> None:
        self.config, self.batches, self.accelerator = config, batches, accelerator
        self.observers = observers
        self.run_dir = location(config.output_dir)
        self.device: torch.device = accelerator.device
        self.positions = positions_of_rank(
            config.global_batch_size,
            choose_partitions(config.global_batch_size, config.num_partitions),
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.model = model or Model(config, batches, accelerator, len(self.positions))
        self.micro_batch_size = self.model.micro_batch_size
        self.step, self.stopped = 0, False
        self.signals = signals or StopOnSignal()
        self._vote = StopVote(accelerator.num_processes, self.device)
        self._interval = Interval(self.step, self.device)
        self._broken = BrokenBatch(len(self.positions), self.device)
        self._source: Iterator[LatentBatch] | None = None
        self._writer = CheckpointWriter(
            self.run_dir,
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
            in_background=config.checkpoint_in_background,
            say=print,  # of every process that writes
        )
        self._saved_step = -1
        self._start()
        self._open_logs()

    def _start(self) -> None:
        """Continue from the newest checkpoint, exactly; else begin, with `--init-from` if given."""
        config = self.config
        self._identity = run_identity(config, self.model.precision, self.batches)
        if checkpoints := checkpoints_of(self.run_dir):
            newest = checkpoints[-1]
            state = newest.read_state()
            refuse_another_run(newest.path, state, self._identity)
            self.model.restore(newest)
            self.step = self._saved_step = newest.step
            self._interval.restore(**state["interval"])
        elif config.init_from:
            self.model.initialise(config.init_from, config.init_weights)

    def _open_logs(self) -> None:
        self.trackers = Trackers(
            self.config.trackers, self.config, self.run_dir, self.accelerator, self.step
        )
        self._flops_per_image = unet_flops(
            load_unet_config(self.config.unet),
            self.batches.latent_shape[-1],
            len(self.batches.null_states),
        )
        peak = matmul_flops_per_sec(self.device, self.model.precision.dtype)
        self._peak_flops_per_sec = peak * self.accelerator.num_processes
        if self.accelerator.is_main_process:
            record = {
                "settings": asdict(self.config),
                "attention": self.model.attention,
                "step": asdict(self.model.plan),
                "micro_batch_size": self.micro_batch_size,
                "flops_per_image": self._flops_per_image,
                "matmul_flops_per_sec": peak,
                **self._identity,
            }
            write_text_whole(self.run_dir / "config.json", canonical_json(record))
            self._metrics = MetricsLog(self.run_dir / "metrics.jsonl", self.step)

    def announce(self) -> None:
        """Say what is about to run, with the arithmetic of the batch."""
        config, say = self.config, self.accelerator.print
        accumulated = len(self.positions) // self.micro_batch_size
        num_parameters = sum(math.prod(p.shape) for p in self.model.unet.parameters())
        say(
            f"U-Net {config.unet}: {num_parameters:,} parameters | {self.device} | "
            f"precision {self.model.precision.name} | attention {self.model.attention} | "
            f"compile {self.model.plan.compile} | sharding {config.sharding} | {self.model.plan}"
        )
        for note in self.model.plan.notes:
            say(note)
        say(
            f"global batch {config.global_batch_size} = micro-batch {self.micro_batch_size} x "
            f"{accumulated} accumulated x {self.accelerator.num_processes} processes | "
            f"{config.prediction_type} | {self._flops_per_image / 1e9:.1f} GFLOP per image, "
            f"{self._peak_flops_per_sec / 1e12:.2f} TFLOP/s of matrix products here"
        )
        if self.step >= config.max_steps:
            say(f"{self.run_dir} is at step {self.step} of {config.max_steps} already")
        elif self.step:
            say(f"continuing {self.run_dir} at step {self.step}")
        elif config.init_from:
            say(f"starting from the {config.init_weights} weights of {config.init_from}")

    # The loop ------------------------------------------------------------------------------------

    def run(self, until: int) -> None:
        """Train until `until` updates are done or a signal asks for a stop."""
        if self._source is None and self.step < until:
            self._source = self.batches.iter_batches(self.step, self.positions)
        self._interval.start_clock(self.step)
        while self.step < until and not self.stopped:
            assert self._source is not None
            with self._interval.waiting():
                batch = next(self._source, None)
            if batch is None:  # whoever waits for data that is not there yet was told to stop
                self.stopped = True
                break
            self._train_step(batch)
            self.step += 1
            if self.step % self.config.log_every == 0 or self.step == until:
                self._log()
            self._observe()
            if self.step % self.config.checkpoint_every == 0:
                self.save()
            self.stopped = self._vote.decide(self.signals.requested)

    def _train_step(self, batch: LatentBatch) -> None:
        """One update from one process's share of the global batch."""
        assert batch.step == self.step
        assert len(batch.samples) == len(self.positions)
        self._broken.remember(self.step, batch.samples)
        losses, grad_norm, left_out = self.model.train_step(
            self.step,
            to_device(batch.moments, self.device),
            to_device(batch.states, self.device),
            self.draw(),
        )
        self._broken.note_rows(self.step, losses, self.model.update.broken_step)
        self._interval.add(losses.mean(), grad_norm, left_out)

    def draw(self) -> Draws:
        """All that is random in the coming step."""
        config = self.config
        return draw(
            seed=config.seed,
            step=self.step,
            positions=self.positions,
            global_batch_size=config.global_batch_size,
            latent_shape=self.batches.latent_shape,
            num_train_timesteps=self.model.objective.num_train_timesteps,
            caption_drop_prob=config.caption_drop_prob,
            device=self.device,
            timestep_sampling=config.timestep_sampling,
            offset_noise=config.offset_noise,
        )

    # Looking at it -------------------------------------------------------------------------------

    def _log(self) -> None:
        """Write a row and open the next interval."""
        sums = self._read_sums()
        row = self._interval.close(self.step, sums, self.config.global_batch_size)
        achieved = row["perf/images_per_sec"] * self._flops_per_image
        row["perf/mfu"] = achieved / self._peak_flops_per_sec
        row["epoch"] = round(self.batches.epoch_at(self.step), 4)
        row["train/learning_rate"] = self.config.learning_rate_at(self.step - 1)
        if self.model.precision.scales_loss:
            row["train/loss_scale"] = self.model.update.loss_scale.item()
        self._record(row)
        self.accelerator.print(log_line(row, self.config.max_steps), flush=True)
        self._interval = Interval(self.step, self.device)

    def _record(self, row: Row) -> None:
        if self.accelerator.is_main_process:
            self._metrics.write(row)
        self.trackers.log(row, self.step)

    def _read_sums(self) -> list[float]:
        """The interval's sums, averaged over the processes; here the host waits for the device.

        Raises:
            UserError: a loss or a gradient was not finite.
        """
        is_broken = (self.model.update.broken_step >= 0).float()
        sums = torch.cat([self._interval.sums, is_broken[None]])
        *means, broken = self.accelerator.reduce(sums, "mean").tolist()
        if broken:
            self._refuse_broken_step()
        self._broken.forget()
        return means

    def _refuse_broken_step(self) -> None:
        steps = gather_objects([int(self.model.update.broken_step)])
        step = min(step for step in steps if step >= 0)
        reports = gather_objects([self._broken.describe(step, self.batches.keys_of)])
        raise broken_batch_error(
            self.run_dir, step, reports, write=self.accelerator.is_main_process
        )

    def _observe(self) -> None:
        """Validation and sample grids, where they are due; no time of theirs counts as training."""
        at_end = self.step == self.config.max_steps
        due = [
            observer
            for observer in self.observers
            if at_end or (observer.every and self.step % observer.every == 0)
        ]
        if not due:
            return
        with self._interval.paused():
            self._read_sums()  # what is broken is not worth looking at
            for observer in due:
                if figures := observer.observe(self):
                    self._record({"step": self.step, **figures})

    # Persistence ---------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step, in the background where memory allows.

        Raises:
            UserError: the weights are not to be trusted: something was not finite.
        """
        interval = {"first_step": self._interval.first_step, "sums": self._read_sums()}
        snapshot = self.model.snapshot(self.step, {**self._identity, "interval": interval})
        if self.config.checkpoint_format == "sharded":
            if self.accelerator.is_main_process:
                self._writer.prepare(self.step)
            self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._metrics.flush()  # first: rows up to a checkpoint that counts are never made again
        if snapshot is not None:
            self._writer.save(snapshot)
        self._saved_step = self.step

    def finish(self) -> None:
        """Checkpoint the last step; export the result once the run is complete."""
        if self._saved_step != self.step:
            self.save()
        self._writer.wait(final=True)
        if self.step < self.config.max_steps:
            self.accelerator.print(f"stopped at step {self.step}; the same command continues")
        else:
            self._export()
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Stop what reads ahead; let the checkpoint under way, and the trackers, end."""
        if isinstance(self._source, Generator):
            self._source.close()
        self._writer.close()
        if self.accelerator.is_main_process:
            self._metrics.flush()
        self.trackers.close()

    def _export(self) -> None:
        """Make the run folder half a diffusers pipeline: `unet/` and `scheduler/`.

        The other half is the model folder: `StableDiffusionPipeline.from_pretrained(model_folder,
        unet=UNet2DConditionModel.from_pretrained(run, subfolder="unet"))`.
        """
        weights = self.model.weights_on_host("ema" if self.model.average else "raw")
        if weights is not None:
            save_unet(self.run_dir / "unet", self.model.unet_config, weights)
            save_scheduler(self.run_dir / "scheduler", self.model.scheduler_config)
