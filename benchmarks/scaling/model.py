"""What data parallelism sends, and what that costs on given links: arithmetic, nothing measured.

A ring all-reduce of B bytes over N devices is a reduce-scatter and an all-gather, in each of which
a device sends B (N-1)/N. Over several nodes each node first does so within itself, then its devices
exchange their slices with the other nodes, all at once, through what the node has of the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shards.column import Json

Sharding = Literal["none", "zero2"]

_FLOAT32_BYTES, _BFLOAT16_BYTES = 4, 2
# A U-Net's backward pass has twice the FLOPs of its forward pass (SD2 at 512 px: 1.995 times).
BACKWARD_FRAC = 2 / 3
ASSUMPTIONS = (
    "the same batch on every device and no accumulation (weak scaling)",
    "links reach the speeds given, and collectives have no latency",
    "all devices are equally fast, at any moment, and no device waits for data",
    f"backward is {BACKWARD_FRAC:.0%} of the step: gradients travel behind it, and the weights of "
    "zero2 behind the forward pass; `without_overlap` hides nothing",
    "what zero2 saves in the optimizer is not counted",
)

# Images per second by number of devices, as published; efficiency counts from the smallest.
_PUBLISHED: tuple[tuple[str, dict[int, float]], ...] = (
    ("mosaicml/diffusion, A100, 256 px", {8: 1100, 16: 2180, 32: 4080, 64: 8530, 128: 11600}),
    ("mosaicml/diffusion, A100, 512 px", {8: 290, 16: 585, 32: 1195, 64: 2340, 128: 4590}),
    ("AWS, P5 H100, 512 px, read off a chart", {8: 195, 64: 1370, 128: 2380, 512: 5510}),
    ("MLPerf 4.0, NVIDIA H100, 512 px", {8: 1007.5, 64: 7072, 512: 37671, 1024: 49909}),
)


@dataclass(frozen=True, kw_only=True)
class Links:
    """What devices are connected with; speeds in one direction.

    Args:
        devices_per_node: that share the fast links.
        intra_node_bytes_per_sec: of each device, within its node.
        inter_node_bytes_per_sec: of each node, to all others.
    """

    devices_per_node: int
    intra_node_bytes_per_sec: float
    inter_node_bytes_per_sec: float

    def ring_sec(self, payload_bytes: float, num_devices: int) -> float:
        """Seconds of one reduce-scatter, or of one all-gather, of so many bytes."""
        in_node = min(num_devices, self.devices_per_node)
        num_nodes = -(-num_devices // self.devices_per_node)
        return (
            _sent(payload_bytes, in_node) / self.intra_node_bytes_per_sec
            + _sent(payload_bytes, num_nodes) / self.inter_node_bytes_per_sec
        )


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Bytes of the collectives of one step, whatever the number of devices.

    Args:
        all_reduce: gradients that every device gets whole.
        reduce_scatter: gradients of which every device gets a part.
        all_gather: weights that every device gets whole.
    """

    all_reduce: int = 0
    reduce_scatter: int = 0
    all_gather: int = 0

    def sent_bytes(self, num_devices: int) -> float:
        """What a device sends in a step."""
        passes = 2 * self.all_reduce + self.reduce_scatter + self.all_gather
        return _sent(passes, num_devices)

    def backward_sec(self, num_devices: int, links: Links) -> float:
        """Time of what may travel during the backward pass."""
        return links.ring_sec(2 * self.all_reduce + self.reduce_scatter, num_devices)

    def forward_sec(self, num_devices: int, links: Links) -> float:
        """Time of what may travel during the forward pass."""
        return links.ring_sec(self.all_gather, num_devices)


def payload_of(num_parameters: int, sharding: Sharding, *, low_weights: bool) -> Payload:
    """What a step of the trainer sends, one forward pass per step.

    Args:
        num_parameters: of the U-Net.
        sharding: `none` averages whole gradients; `zero2` scatters them, in float32, and gathers
            the updated weights.
        low_weights: the model is kept in bfloat16, beside float32 masters.
    """
    low_bytes = num_parameters * (_BFLOAT16_BYTES if low_weights else _FLOAT32_BYTES)
    if sharding == "none":
        return Payload(all_reduce=low_bytes)
    return Payload(reduce_scatter=num_parameters * _FLOAT32_BYTES, all_gather=low_bytes)


def predict(num_devices: int, compute_sec: float, payload: Payload, links: Links) -> Json:
    """A step on so many devices, and the efficiency against one.

    Args:
        num_devices: that train together.
        compute_sec: of a step on one device.
        payload: of a step.
        links: between the devices.
    """
    backward_sec = payload.backward_sec(num_devices, links)
    forward_sec = payload.forward_sec(num_devices, links)
    exposed_sec = max(0.0, backward_sec - BACKWARD_FRAC * compute_sec)
    exposed_sec += max(0.0, forward_sec - (1 - BACKWARD_FRAC) * compute_sec)
    communication_sec = backward_sec + forward_sec
    return {
        "num_devices": num_devices,
        "efficiency": compute_sec / (compute_sec + exposed_sec),
        "efficiency_without_overlap": compute_sec / (compute_sec + communication_sec),
        "step_sec": compute_sec + exposed_sec,
        "communication_sec": communication_sec,
        "exposed_sec": exposed_sec,
        "sent_bytes_per_device": payload.sent_bytes(num_devices),
    }


def published_efficiencies() -> list[Json]:
    """What others have measured, to hold a prediction against; see `_PUBLISHED`."""
    rows = []
    for source, rates in _PUBLISHED:
        base = min(rates)
        for count, rate in rates.items():
            if count > base:
                efficiency = rate / count / (rates[base] / base)
                figures = {"num_devices": count, "against": base, "efficiency": efficiency}
                rows.append({"source": source, **figures})
    return rows


def _sent(payload_bytes: float, count: int) -> float:
    return payload_bytes * (count - 1) / count
