"""ZeRO-2: gradients, masters, optimizer and average split among the processes.

torch's `fully_shard` with weights that stay gathered between forward and backward: FSDP's
SHARD_GRAD_OP. It splits along the first dimension, and wants plain strides.
"""

from __future__ import annotations

from typing import Any

import torch

from train.precision import Precision


def shard_unet(unet: Any, precision: Precision, device: torch.device, num_processes: int) -> None:
    """Split a U-Net's parameters among all processes, in place.

    Args:
        unet: on its device, the same on every process.
        precision: with low-precision weights the gathered copies have its dtype; masters and
            reduced gradients stay float32.
        device: of this process.
        num_processes: of the run.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    unet.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(device.type, (num_processes,))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision.has_low_weights:
        policy = MixedPrecisionPolicy(
            param_dtype=precision.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    # Blocks are gathered one by one, so that the next one's weights travel while one computes.
    for part in (*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet):
        fully_shard(part, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
