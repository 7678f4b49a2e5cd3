"""Triton kernels of the channels-last group norm; see `train.fused.group_norm` for what they do.

A tensor is [images, positions, channels], channels innermost. A program reads a tile of one image:
`block_rows` positions by `block_channels` channels, which are contiguous, so that groups may be of
any size and straddle tiles. What is summed over positions goes through a small buffer with a row
per tile (a chunk of the image), and a second kernel adds the rows up: no atomics, so equal input
gives equal bits. Arithmetic is float32.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(image, positions, channels, block_rows: tl.constexpr, block_channels: tl.constexpr):
    """Where this program's tile begins, the offsets within it, and which of them exist."""
    first_row = tl.program_id(1) * block_rows
    rows = tl.arange(0, block_rows)
    channel = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    # A batch of activations may have more than 2^31 elements.
    start = (image.to(tl.int64) * positions + first_row) * channels
    offsets = rows[:, None] * channels + channel[None, :]
    mask = (first_row + rows < positions)[:, None] & (channel < channels)[None, :]
    return start, offsets, mask, channel


@triton.jit
def _load_normalised(x, statistics, image, channels, start, offsets, mask, channel):
    """The tile as the norm has it before its weights, zero outside; and the deviations' inverse."""
    values = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
    centre, rstd = _load_pair(statistics, image, channels, channel)
    return tl.where(mask, (values - centre) * rstd, 0.0), rstd


@triton.jit
def _load_pair(pairs, image, channels, channel):
    """Two numbers of each channel, from [images, 2, channels]."""
    at = pairs + 2 * image * channels + channel
    first = tl.load(at, mask=channel < channels, other=0.0)
    second = tl.load(at + channels, mask=channel < channels, other=0.0)
    return first[None, :], second[None, :]


@triton.jit
def _load_affine(weight, bias, channel, channels):
    scale = tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    return scale[None, :], offset[None, :]


# Forward ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_chunks"])
def tile_statistics(
    x, partial, positions, channels, num_chunks,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over a tile's positions.

    The tile is in registers, so that the mean is known before the deviations are squared: nothing
    cancels. `partial` is [images, chunks, 2, channels].
    """
    image = tl.program_id(2)
    start, offsets, mask, channel = _tile(image, positions, channels, block_rows, block_channels)
    values = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
    num_rows = tl.minimum(positions - tl.program_id(1) * block_rows, block_rows).to(tl.float32)
    mean = tl.sum(values, axis=0) / num_rows
    deviations = tl.where(mask, values - mean[None, :], 0.0)
    squares = tl.sum(deviations * deviations, axis=0)
    at = partial + 2 * (image * num_chunks + tl.program_id(1)).to(tl.int64) * channels + channel
    tl.store(at, mean, mask=channel < channels)
    tl.store(at + channels, squares, mask=channel < channels)


@triton.jit
def _load_distances(
    rows, added, origin, first, positions, channels, num_chunks, channel, in_group,
    block_rows: tl.constexpr, block_chunks: tl.constexpr,
):  # fmt: skip
    """Means of tiles less `origin`, with how many positions each tile has."""
    chunk = first + tl.arange(0, block_chunks)
    mask = (chunk < num_chunks)[:, None] & in_group[None, :]
    at = rows + 2 * chunk[:, None] * channels + channel[None, :]
    distances = tl.load(at, mask=mask, other=0.0) - origin + added[None, :]
    num_rows = tl.minimum(positions - chunk * block_rows, block_rows).to(tl.float32)
    return at, mask, distances, num_rows[:, None]


@triton.jit(do_not_specialize=["shift_stride", "group_size", "num_chunks"])
def combine_statistics(
    partial, shift, shift_stride, statistics, positions, channels, group_size, num_chunks, eps,
    block_rows: tl.constexpr, block_chunks: tl.constexpr, block_group: tl.constexpr,
    has_shift: tl.constexpr,
):  # fmt: skip
    """Mean and deviation of a group from those of its channels' tiles.

    Chan, Golub and LeVeque's formula. A shift moves a channel's mean and leaves its deviations.
    `statistics` is [images, 2, channels]: what to subtract from x, and what to multiply with.
    """
    group, image = tl.program_id(0), tl.program_id(1)
    member = tl.arange(0, block_group)
    channel, in_group = group * group_size + member, member < group_size
    added = tl.zeros([block_group], dtype=tl.float32)
    if has_shift:
        added = tl.load(shift + image * shift_stride + channel, mask=in_group, other=0.0)
        added = added.to(tl.float32)
    rows = partial + 2 * image.to(tl.int64) * num_chunks * channels
    # Sums of differences to some mean of the group stay exact where all values are large.
    origin = tl.load(rows + group * group_size)
    total = tl.zeros([block_chunks, block_group], dtype=tl.float32)
    for first in range(0, num_chunks, block_chunks):
        _, mask, distances, num_rows = _load_distances(
            rows, added, origin, first, positions, channels, num_chunks, channel, in_group,
            block_rows, block_chunks,
        )  # fmt: skip
        total += tl.where(mask, num_rows * distances, 0.0)
    size = 1.0 * positions * group_size
    mean = tl.sum(tl.sum(total, axis=0), axis=0) / size
    squares = tl.zeros([block_chunks, block_group], dtype=tl.float32)
    for first in range(0, num_chunks, block_chunks):
        at, mask, distances, num_rows = _load_distances(
            rows, added, origin, first, positions, channels, num_chunks, channel, in_group,
            block_rows, block_chunks,
        )  # fmt: skip
        distances -= mean
        within = tl.load(at + channels, mask=mask, other=0.0)
        squares += tl.where(mask, within + num_rows * distances * distances, 0.0)
    variance = tl.sum(tl.sum(squares, axis=0), axis=0) / size
    at = statistics + 2 * image * channels + channel
    tl.store(at, origin + mean - added, mask=in_group)
    rstd = 1.0 / tl.sqrt(variance + eps)
    tl.store(at + channels, rstd + tl.zeros([block_group], dtype=tl.float32), mask=in_group)


@triton.jit
def normalise(
    x, statistics, weight, bias, y, positions, channels,
    block_rows: tl.constexpr, block_channels: tl.constexpr, silu: tl.constexpr,
):  # fmt: skip
    """The norm itself, and SiLU."""
    image = tl.program_id(2)
    start, offsets, mask, channel = _tile(image, positions, channels, block_rows, block_channels)
    normalised, _ = _load_normalised(x, statistics, image, channels, start, offsets, mask, channel)
    scale, offset = _load_affine(weight, bias, channel, channels)
    result = normalised * scale + offset
    if silu:
        result = result * tl.sigmoid(result)
    tl.store(y + start + offsets, result.to(y.dtype.element_ty), mask=mask)


# Backward -----------------------------------------------------------------------------------------


@triton.jit
def _load_gradient(
    dy, normalised, weight, bias, channels, start, offsets, mask, channel, silu: tl.constexpr
):
    """Gradient of the norm before SiLU; zero outside the tile."""
    gradient = tl.load(dy + start + offsets, mask=mask, other=0.0).to(tl.float32)
    if silu:
        scale, offset = _load_affine(weight, bias, channel, channels)
        before = normalised * scale + offset
        sigmoid = tl.sigmoid(before)
        gradient = gradient * sigmoid * (1.0 + before * (1.0 - sigmoid))
    return gradient


@triton.jit(do_not_specialize=["num_chunks"])
def tile_gradients(
    dy, x, statistics, weight, bias, partial, positions, channels, num_chunks,
    block_rows: tl.constexpr, block_channels: tl.constexpr, silu: tl.constexpr,
    has_shift: tl.constexpr,
):  # fmt: skip
    """Sums over a tile's positions, channel by channel, in `partial` [images, chunks, 3, channels].

    Of the gradient, of its product with the normalised input, and of the normalised input.
    """
    image = tl.program_id(2)
    start, offsets, mask, channel = _tile(image, positions, channels, block_rows, block_channels)
    normalised, _ = _load_normalised(x, statistics, image, channels, start, offsets, mask, channel)
    gradient = _load_gradient(
        dy, normalised, weight, bias, channels, start, offsets, mask, channel, silu
    )
    exists = channel < channels
    at = partial + 3 * (image * num_chunks + tl.program_id(1)).to(tl.int64) * channels + channel
    tl.store(at, tl.sum(gradient, axis=0), mask=exists)
    tl.store(at + channels, tl.sum(gradient * normalised, axis=0), mask=exists)
    if has_shift:
        tl.store(at + 2 * channels, tl.sum(normalised, axis=0), mask=exists)


@triton.jit(do_not_specialize=["group_size", "num_chunks"])
def combine_gradients(
    partial, weight, statistics, per_image, coefficients, d_shift, positions, channels, group_size,
    num_chunks, block_chunks: tl.constexpr, block_group: tl.constexpr, has_shift: tl.constexpr,
):  # fmt: skip
    """Adds up the tiles of a group.

    Gives what `input_gradient` subtracts (`coefficients` [images, 2, channels]: a constant, and a
    multiple of the normalised input), an image's part of the affine gradients (`per_image` [images,
    2, channels]), and the shift's gradient, which is the input's summed over positions.
    """
    group, image = tl.program_id(0), tl.program_id(1)
    member = tl.arange(0, block_group)
    channel, in_group = group * group_size + member, member < group_size
    gradients = tl.zeros([block_chunks, block_group], dtype=tl.float32)
    products = tl.zeros([block_chunks, block_group], dtype=tl.float32)
    inputs = tl.zeros([block_chunks, block_group], dtype=tl.float32)
    rows = partial + 3 * image.to(tl.int64) * num_chunks * channels
    for first in range(0, num_chunks, block_chunks):
        chunk = first + tl.arange(0, block_chunks)
        mask = (chunk < num_chunks)[:, None] & in_group[None, :]
        at = rows + 3 * chunk[:, None] * channels + channel[None, :]
        gradients += tl.load(at, mask=mask, other=0.0)
        products += tl.load(at + channels, mask=mask, other=0.0)
        if has_shift:
            inputs += tl.load(at + 2 * channels, mask=mask, other=0.0)
    gradient, product = tl.sum(gradients, axis=0), tl.sum(products, axis=0)
    at = per_image + 2 * image * channels + channel
    tl.store(at, gradient, mask=in_group)
    tl.store(at + channels, product, mask=in_group)

    scale = tl.load(weight + channel, mask=in_group, other=0.0).to(tl.float32)
    num_positions = 1.0 * positions  # a number of 1 is a constant to Triton, without methods
    at = 2 * image * channels + channel
    nothing = tl.zeros([block_group], dtype=tl.float32)
    constant = tl.sum(scale * gradient, axis=0) / (num_positions * group_size)
    slope = tl.sum(scale * product, axis=0) / (num_positions * group_size)
    tl.store(coefficients + at, constant + nothing, mask=in_group)
    tl.store(coefficients + at + channels, slope + nothing, mask=in_group)
    if has_shift:
        rstd = tl.load(statistics + at + channels, mask=in_group, other=0.0)
        summed = scale * gradient - num_positions * constant - slope * tl.sum(inputs, axis=0)
        summed = (rstd * summed).to(d_shift.dtype.element_ty)
        tl.store(d_shift + image * channels + channel, summed, mask=in_group)


@triton.jit(do_not_specialize=["num_images"])
def affine_gradients(
    per_image, d_weight, d_bias, num_images, channels,
    block_images: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias: the sums over images."""
    channel = tl.program_id(0) * block_channels + tl.arange(0, block_channels)
    exists = channel < channels
    gradients = tl.zeros([block_images, block_channels], dtype=tl.float32)
    products = tl.zeros([block_images, block_channels], dtype=tl.float32)
    for first in range(0, num_images, block_images):
        image = first + tl.arange(0, block_images)
        mask = (image < num_images)[:, None] & exists[None, :]
        at = per_image + 2 * image[:, None] * channels + channel[None, :]
        gradients += tl.load(at, mask=mask, other=0.0)
        products += tl.load(at + channels, mask=mask, other=0.0)
    gradient, product = tl.sum(gradients, axis=0), tl.sum(products, axis=0)
    tl.store(d_bias + channel, gradient.to(d_bias.dtype.element_ty), mask=exists)
    tl.store(d_weight + channel, product.to(d_weight.dtype.element_ty), mask=exists)


@triton.jit
def input_gradient(
    dy, x, statistics, weight, bias, coefficients, dx, positions, channels,
    block_rows: tl.constexpr, block_channels: tl.constexpr, silu: tl.constexpr,
):  # fmt: skip
    """Gradient of the input."""
    image = tl.program_id(2)
    start, offsets, mask, channel = _tile(image, positions, channels, block_rows, block_channels)
    normalised, rstd = _load_normalised(
        x, statistics, image, channels, start, offsets, mask, channel
    )
    gradient = _load_gradient(
        dy, normalised, weight, bias, channels, start, offsets, mask, channel, silu
    )
    scale, _ = _load_affine(weight, bias, channel, channels)
    constant, slope = _load_pair(coefficients, image, channels, channel)
    result = rstd * (gradient * scale - constant - normalised * slope)
    tl.store(dx + start + offsets, result.to(dx.dtype.element_ty), mask=mask)
