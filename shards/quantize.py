"""Eight bits a number: symmetric integers with float32 scales, half the bytes of float16.

Latents: one scale for each sample and channel, `max |x| / 127`. Text states: one scale for each
token on top of a static one for each channel, because a few channels of CLIP's states are tens of
times larger than the rest in every token: x[t, d] = q[t, d] * scale[t] * channel_scale[d].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_LARGEST = 127


@dataclass(frozen=True)
class Quantized:
    """Integers and what to multiply them by.

    Args:
        values: int8.
        scales: arrays that broadcast against `values`; all of them are factors.
    """

    values: np.ndarray
    scales: tuple[np.ndarray, ...]

    def dequantize(self) -> np.ndarray:
        """The numbers, float32."""
        numbers = self.values.astype(np.float32)
        for scale in self.scales:
            numbers = numbers * scale
        return numbers


def quantize_latents(latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moments or means float [N, C, h, w] to int8 of that shape and scales float32 [N, C]."""
    scale = _scale(np.abs(latents).max(axis=(2, 3)))
    return _round(latents, scale[:, :, None, None]), scale


def latents_of(values: np.ndarray, scale: np.ndarray) -> Quantized:
    """What `quantize_latents` made, as numbers."""
    return Quantized(values, (scale[:, :, None, None],))


def channel_scale(states: np.ndarray) -> np.ndarray:
    """Static scale of each channel, float32 [D], from the states float [..., T, D] of captions.

    The first token is left out: CLIP's attention is causal, so its state is one and the same for
    every caption, and its outliers would cost all other tokens their resolution.
    """
    largest = np.abs(states[..., 1:, :]).reshape(-1, states.shape[-1]).max(axis=0)
    return np.where(largest > 0, largest, 1.0).astype(np.float32)


def quantize_states(states: np.ndarray, static: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States float [U, T, D] to int8 of that shape and scales float32 [U, T].

    Args:
        static: float32 [D], from `channel_scale`.
    """
    even = states.astype(np.float32) / static
    scale = _scale(np.abs(even).max(axis=2))
    return _round(even, scale[:, :, None]), scale


def states_of(values: np.ndarray, scale: np.ndarray, static: np.ndarray) -> Quantized:
    """What `quantize_states` made, as numbers."""
    return Quantized(values, (scale[:, :, None], static))


def _scale(largest: np.ndarray) -> np.ndarray:
    scale = np.asarray(largest, np.float32) / _LARGEST
    return np.where(scale > 0, scale, np.float32(1.0)).astype(np.float32)


def _round(numbers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    rounded = np.rint(numbers.astype(np.float32) / scale)
    return np.clip(rounded, -_LARGEST, _LARGEST).astype(np.int8)
