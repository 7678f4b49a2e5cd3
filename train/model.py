"""The U-Net in training: built, wrapped for data parallelism, with what updates its weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object as gather_objects
from torch import Tensor

from shards.batch import BatchSource
from train.attention import apply_attention
from train.blocks import keep_channels_last, use_fused_geglu, use_fused_norms
from train.checkpoint import Checkpoint, Snapshot, optimizer_tensors, restore_optimizer
from train.compilation import compile_model
from train.config import TrainConfig
from train.diffusion_loss import DiffusionLoss
from train.draws import Draws
from train.ema import WeightAverage
from train.initial_weights import load_initial_weights
from train.master_weights import MasterWeights
from train.micro_batch import choose_micro_batch, peak_bytes_on_gpu
from train.norms import use_low_precision_norms
from train.objective import Objective
from train.precision import resolve_precision
from train.projections import Part, batch_projections
from train.sharding import shard_unet
from train.step_graph import CudaRecorder, Outputs, StepGraph
from train.step_plan import StepPlan, agreed, plan_step
from train.unet import build_unet, load_unet_config
from train.update import Update

_TRIAL_ROWS = 32  # that kernels are measured with, where the micro-batch is not known yet


class Model:
    """What a run trains, on one process.

    Args:
        config: the run.
        batches: says what the U-Net is fed.
        accelerator: device and processes.
        share: rows of a step on this process.

    Attributes:
        micro_batch_size: rows of a forward pass, see `train.micro_batch`.
        unet: the raw module, not wrapped for data parallelism.
        loss_module: the U-Net with the objective around it.
        weights: float32 masters of the U-Net's parameters.
        update: the optimizer with what belongs around it.
        plan: which of the switches that make a step fast are on.
        attention: what runs, for the log.
        graph: replays the device's part of a step; None where it is handed out anew each time.
    """

    def __init__(
        self,
        config: TrainConfig,
        batches: BatchSource,
        accelerator: Accelerator,
        share: int,
    ) -> None:
        self._config, self._accelerator = config, accelerator
        device = accelerator.device
        self.precision = precision = resolve_precision(config.mixed_precision, device)
        self.objective = Objective(config, device)
        null_states = torch.from_numpy(batches.null_states).to(device)
        self._latent_size = batches.latent_shape[-1]
        plan = plan_step(config, precision, device, accelerator.num_processes)
        self.plan = agreed([plan, *gather_objects([plan])])
        self.unet = self._build(config.seed).to(device)
        # diffusers' note to itself is in no order, and it leaves it out of its own files as well.
        noted = "_use_default_values"
        self.unet_config = {n: value for n, value in self.unet.config.items() if n != noted}
        parts, requested = _rebuild(self.unet, self.plan), config.micro_batch_size
        self.attention = apply_attention(
            self.unet,
            config.attention,
            device=device,
            dtype=precision.dtype,
            latent_shape=batches.latent_shape,
            num_tokens=len(null_states),
            batch_size=min(share, _TRIAL_ROWS) if requested == "auto" else requested or share,
        )
        if config.low_precision_norm:
            use_low_precision_norms(self.unet, precision.dtype)
        self._is_sharded = config.sharding == "zero2"
        if self._is_sharded:
            shard_unet(self.unet, precision, device, accelerator.num_processes)
        low = precision.dtype if precision.has_low_weights else torch.float32
        self.weights = MasterWeights(self.unet, low, accelerator.num_processes, parts)
        self.update = Update(config, self.weights, precision, device, fused=self.plan.fused_update)
        self.loss_module = DiffusionLoss(
            self.unet,
            self.objective,
            null_states,
            batches.scaling_factor,
            dtype=precision.dtype,
            autocast=precision.autocast,
            channels_last=self.plan.channels_last,
        )
        self.micro_batch_size = self._choose_micro_batch(share, batches)
        compile_model(self.loss_module, self.plan.compile)
        self._wrapped: Any = self.loss_module
        if not self._is_sharded:
            # It is in place; Accelerate would copy to "cpu:0", away from the masters.
            self._wrapped = accelerator.prepare(self.loss_module, device_placement=[False])
        self.graph: StepGraph | None = StepGraph(CudaRecorder()) if self.plan.cuda_graph else None

    def _build(self, seed: int) -> Any:
        unet = build_unet(load_unet_config(self._config.unet), self._latent_size, seed)
        layout = torch.channels_last if self.plan.channels_last else torch.contiguous_format
        return unet.to(memory_format=layout)

    def _choose_micro_batch(self, share: int, batches: BatchSource) -> int:
        """The same on every process."""
        requested, device = self._config.micro_batch_size, self._accelerator.device
        if requested != "auto" or device.type != "cuda":
            return choose_micro_batch(requested, share)
        text_shape = batches.null_states.shape
        peak = partial(peak_bytes_on_gpu, self.loss_module, batches.latent_shape, text_shape)
        to_come = self._bytes_to_come()
        free_bytes, _ = torch.cuda.mem_get_info(device)  # another process may have some of it
        usable_bytes = free_bytes + torch.cuda.memory_reserved(device)
        size = choose_micro_batch("auto", share, lambda rows: peak(rows) + to_come, usable_bytes)
        sizes: Tensor = self._accelerator.gather(torch.tensor([size], device=device))
        return int(sizes.min())

    def _bytes_to_come(self) -> int:
        """Of what lives as long as the run, but is made later: as float32, a number a weight."""
        moments = 0 if self.update.is_fused else 2
        sums = int(self.precision.has_low_weights)
        average = int(self._config.ema_decay > 0)
        num_weights = sum(weight.numel() for weight in self.weights.tensors.values())
        return 4 * num_weights * (moments + sums + average)

    # One step ------------------------------------------------------------------------------------

    def train_step(
        self, step: int, moments: Tensor, states: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward over micro-batches, then one update.

        Args:
            step: its number, from 0.
            moments: this process's rows, on the device.
            states: the same.
            draws: the same.

        Returns:
            losses [B] of the samples, the gradient norm, and whether the update was left out.
        """
        self.update.begin(step)
        moves_average = self.update.moves_average(step)
        function = partial(self._step, moves_average=moves_average)
        inputs = {"moments": moments, "states": states, **vars(draws)}
        if self.graph is None:
            losses, norm, left_out = function(**inputs)
        else:
            losses, norm, left_out = self.graph.run(moves_average, function, inputs)
        self.update.end(step)
        return losses, norm, left_out

    def _step(
        self, moments: Tensor, states: Tensor, *, moves_average: bool, **drawn: Tensor
    ) -> Outputs:
        """The device's part of a step: all that a recording holds."""
        losses, accumulated = self.backward(moments, states, Draws(**drawn))
        norm, left_out = self.update.advance(
            losses.mean(), accumulated=accumulated, moves_average=moves_average
        )
        return losses, norm, left_out

    def backward(self, moments: Tensor, states: Tensor, draws: Draws) -> tuple[Tensor, bool]:
        """Forward and backward over micro-batches.

        Args:
            moments: this process's rows, on the device.
            states: the same.
            draws: the same.

        Returns:
            losses [B] of the samples, and whether the gradients were summed up apart.
        """
        torch.backends.cudnn.benchmark = self.plan.conv_search  # other models may want it otherwise
        starts = range(0, len(moments), self.micro_batch_size)
        accumulates = self.weights.accumulates(len(starts))
        losses = []
        for start in starts:
            rows = slice(start, start + self.micro_batch_size)
            is_last = start == starts[-1]
            with self._averaging(is_last and not accumulates):
                per_sample = self._losses(moments[rows], states[rows], draws, rows)
                loss = per_sample.mean() / len(starts)
                self._accelerator.backward(self.update.scaled(loss))
            if accumulates:
                self.weights.add_gradients(is_first=start == starts[0])
            losses.append(per_sample.detach())
        return torch.cat(losses), accumulates

    def _losses(self, moments: Tensor, states: Tensor, draws: Draws, rows: slice) -> Tensor:
        losses: Tensor = self._wrapped(
            moments,
            states,
            draws.posterior_noise[rows],
            draws.noise[rows],
            draws.timesteps[rows],
            draws.drop_caption[rows],
        )
        return losses

    def _averaging(self, average: bool) -> AbstractContextManager[Any]:
        """Average gradients among processes after this micro-batch, or leave them be."""
        if self._is_sharded:
            self.unet.set_requires_gradient_sync(average)
            return nullcontext()
        no_sync: Callable[..., AbstractContextManager[Any]] = self._accelerator.no_sync
        return nullcontext() if average else no_sync(self._wrapped)

    # Weights in and out --------------------------------------------------------------------------

    @property
    def average(self) -> WeightAverage | None:
        """Of the weights, once it has started."""
        return self.update.average

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The noise schedule as diffusers' samplers take it."""
        return self.objective.scheduler_config()

    def initialise(self, source: str, kind: str) -> None:
        """Take over weights alone; see `load_initial_weights`."""
        unet = self._build(seed=0)
        load_initial_weights(source, kind, unet)
        self.weights.load({name: p.detach() for name, p in unet.named_parameters()})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over all that a checkpoint holds: weights, optimizer, loss scale, average."""
        state = checkpoint.read_state()["loss_scale"]
        self.weights.load(checkpoint.tensors("unet"))
        moments = {
            name: self.weights.piece_of(name.rpartition(".")[0], moment)
            for name, moment in checkpoint.tensors("optimizer").items()
        }
        restore_optimizer(self.update.optimizer, list(self.weights.tensors), moments)
        self.update.loss_scale.fill_(state["scale"])
        self.update.good_steps.fill_(state["good_steps"])
        if self.update.has_average(checkpoint.step):
            self.update.average = self.update.start_average()
            average = checkpoint.tensors("unet_ema")
            self.update.average.load(
                {name: self.weights.piece_of(name, weight) for name, weight in average.items()}
            )

    def snapshot(self, step: int, state: dict[str, Any]) -> Snapshot | None:
        """What this process writes of a checkpoint; a collective where the weights are sharded.

        Args:
            step: updates done.
            state: what else the trainer goes on from.

        Returns:
            None where the main process writes all of it.
        """
        weights, average = self.weights.tensors, self.average.weights if self.average else None
        moments = optimizer_tensors(self.update.optimizer, list(weights))
        pieces = self.weights.pieces()
        if self._config.checkpoint_format == "full":
            weights, pieces = self.weights.whole(weights), {}
            average = self.weights.whole(average) if average else None
            moments = self.weights.whole_optimizer(moments)
            if not self._accelerator.is_main_process:
                return None
        scale = {
            "scale": self.update.loss_scale.item(),
            "good_steps": self.update.good_steps.item(),
        }
        return Snapshot(
            step=step,
            state={**state, "loss_scale": scale},
            unet_config=self.unet_config,
            scheduler_config=self.scheduler_config,
            weights=weights,
            average=average,
            optimizer=moments,
            pieces=pieces,
            process=self._accelerator.process_index if pieces else 0,
            num_processes=self._accelerator.num_processes if pieces else 1,
        )

    def weights_on_host(self, kind: str) -> dict[str, Tensor] | None:
        """Whole float32 weights by name, on the CPU of the main process; a collective.

        Args:
            kind: `raw` or `ema`.

        Returns:
            None on the other processes, and where there is no average.
        """
        if kind == "ema" and self.average is None:
            return None
        chosen = self.average.weights if kind == "ema" and self.average else self.weights.tensors
        whole = self.weights.whole(chosen)
        if not self._accelerator.is_main_process:
            return None
        return {name: weight.detach().float().cpu() for name, weight in whole.items()}


def _rebuild(unet: Any, plan: StepPlan) -> dict[str, Part]:
    """Give a U-Net the modules of a plan, in place.

    Returns:
        which of diffusers' parameters are rows of which of the U-Net's.
    """
    if plan.channels_last:
        keep_channels_last(unet)
    if plan.fused_norms:
        use_fused_norms(unet)
    if plan.fused_geglu:
        use_fused_geglu(unet)
    return batch_projections(unet) if plan.batched_projections else {}
