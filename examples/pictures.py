"""Richer pictures than scenes, drawn from nothing: what keeps the tiny VAE honest on real images.

A VAE that has only seen flat shapes has latents of the wrong scale on anything else. These
pictures have what scenes lack: soft shading, many overlapping parts, mirror symmetry, outlines,
shadows, texture, noise, and plenty of white paper. They mean nothing and carry no caption.
"""

from __future__ import annotations

import numpy as np

RESOLUTION = 128


def draw_picture(rng: np.random.Generator) -> np.ndarray:
    """Draw one picture: [128, 128, 3] uint8."""
    picture = _draw_ground(rng)
    body = rng.uniform(0.25, 0.46, size=2)
    x, y = rng.normal(0.5, 0.03, size=2)
    if rng.random() < 0.3:
        _paint(picture, rng, (x, y + 0.05), body * 1.05, softness=12.0, strength=0.35)
    _paint(picture, rng, (x, y), body)
    symmetric = rng.random() < 0.5
    for _ in range(rng.integers(2, 16)):
        reach = rng.uniform(-1.0, 1.0, size=2) * body
        radii = rng.uniform(0.015, 0.5) * body * rng.uniform(0.4, 1.6, size=2)
        state = rng.bit_generator.state
        _paint(picture, rng, (x + reach[0], y + reach[1]), radii)
        if symmetric:
            rng.bit_generator.state = state  # the same part again, on the other side
            _paint(picture, rng, (x - reach[0], y + reach[1]), radii, mirrored=True)
    if rng.random() < 0.05:
        picture += rng.normal(0.0, rng.uniform(2, 12), size=picture.shape)
    return np.rint(picture.clip(0, 255)).astype(np.uint8)


def _draw_ground(rng: np.random.Generator) -> np.ndarray:
    """Draw what is behind: mostly white paper, else a shaded or textured colour."""
    picture = np.full((RESOLUTION, RESOLUTION, 3), 255.0, dtype=np.float32)
    if rng.random() < 0.75:
        return picture
    u, v = _axes(rng.uniform(0, 2 * np.pi))
    picture[:] = _colour(rng) + u[..., None] * rng.normal(0, 90, size=3)
    if rng.random() < 0.4:
        wave = np.sin(u * rng.uniform(6, 60) + np.sin(v * rng.uniform(2, 20)))
        picture += wave[..., None] * rng.normal(0, 40, size=3)
    return picture


def _axes(angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates around the centre, in fractions of the side, turned by an angle."""
    line = (np.arange(RESOLUTION, dtype=np.float32) + 0.5) / RESOLUTION - 0.5
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return line[None, :] * cos + line[:, None] * sin, line[:, None] * cos - line[None, :] * sin


def _colour(rng: np.random.Generator) -> np.ndarray:
    """Draw a colour: a grey, a warm one (skin, hair, wood), a strong one, or any."""
    kind = rng.random()
    if kind < 0.25:
        return np.full(3, rng.uniform(0, 255))
    if kind < 0.55:
        return np.sort(rng.uniform(0, 255, size=3) ** 0.9 * 1.7)[::-1].clip(0, 255)
    if kind < 0.85:
        return rng.permutation([rng.uniform(0, 70), rng.uniform(0, 255), rng.uniform(190, 255)])
    return rng.uniform(0, 255, size=3)


def _paint(
    picture: np.ndarray,
    rng: np.random.Generator,
    centre: tuple[float, float],
    radii: np.ndarray,
    *,
    softness: float | None = None,
    strength: float | None = None,
    mirrored: bool = False,
) -> None:
    """Paint one shaded part in place: a rounded body, or its outline."""
    angle = rng.normal(0.0, 0.5) * (-1 if mirrored else 1)
    power = rng.choice([2.0, 2.0, 3.0, 8.0])
    if softness is None:
        softness = 0.7 if rng.random() < 0.8 else rng.uniform(1, 10)
    if strength is None:
        strength = 1.0 if rng.random() < 0.8 else rng.uniform(0.3, 1.0)
    outline = rng.uniform(0.15, 0.5) if rng.random() < 0.15 else None
    colour, shade = _colour(rng), rng.normal(0, 50)
    tint, light = rng.normal(0, 25, size=3), rng.uniform(-1, 1, size=2)

    u, v = _axes(angle)
    du = np.cos(angle) * (centre[0] - 0.5) + np.sin(angle) * (centre[1] - 0.5)
    dv = np.cos(angle) * (centre[1] - 0.5) - np.sin(angle) * (centre[0] - 0.5)
    u, v = (u - np.float32(du)) / radii[0], (v - np.float32(dv)) / radii[1]
    radius = (np.abs(u) ** power + np.abs(v) ** power) ** (1 / power)
    if outline is not None:
        radius = np.abs(radius - 1) / outline
    edge = softness / (radii.min() * RESOLUTION)
    alpha = strength * np.clip((1 - radius) / edge + 0.5, 0.0, 1.0)[..., None]
    slope = (u * light[0] + v * light[1])[..., None]
    picture += alpha * ((colour + slope * (shade + tint)).clip(0, 255) - picture)
