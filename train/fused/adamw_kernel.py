"""The kernel of `FusedAdamW`: one pass over all parameters. Importing this imports Triton."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

NUM_WARPS = 8
BLOCK_SIZE = 1024  # 4 elements a thread: float32 moves 16 bytes at a time, a warp without gaps
TAIL_SIZE = 256  # 1 element a thread
CHUNK_SIZE = 16384  # elements of one program
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pointers(address, dtype: tl.constexpr, offsets, aligned: tl.constexpr):
    """Pointers to elements of a tensor; `aligned`: the tensor begins at a multiple of 16 bytes."""
    base = address.to(tl.pointer_type(dtype))
    if aligned:
        base = tl.multiple_of(base, 16)
    return base + offsets


@triton.jit
def _update_block(
    addresses,  # of gradient, master, exp_avg, exp_avg_sq, published, average
    scalars,  # step size, epsilon, decay, divisor, 1 - beta1, 1 - beta2, average weight
    counts,  # not left out
    first,
    end,
    gradient_type: tl.constexpr,
    published_type: tl.constexpr,
    has_average: tl.constexpr,
    aligned: tl.constexpr,
    block_size: tl.constexpr,
):
    """Update the elements from `first` on that lie before `end`.

    With d the gradients' divisor, c1, c2 the bias corrections 1 - beta^step, and w the average's
    weight:

        g = gradient / d
        m += (1 - beta1) (g - m)
        v += (1 - beta2) (g^2 - v)
        p -= lr wd p + lr sqrt(c2) / c1 * m / (sqrt(v) + eps sqrt(c2))
        a += w (p - a)

    Each state is rounded once a step: moving by a difference, not by beta * m + (1 - beta) * g,
    whose two coefficients no longer add up to 1 once they are float32.
    """
    step_size, epsilon, decay, divisor, weight1, weight2, average_weight = scalars
    offsets = first + tl.arange(0, block_size)
    inside = offsets < end
    changes = offsets < tl.where(counts, end, 0)

    gradients = _pointers(addresses[0], gradient_type, offsets, aligned)
    masters = _pointers(addresses[1], tl.float32, offsets, aligned)
    exp_avgs = _pointers(addresses[2], tl.float32, offsets, aligned)
    exp_avg_sqs = _pointers(addresses[3], tl.float32, offsets, aligned)
    g = tl.load(gradients, mask=changes, other=0.0).to(tl.float32)
    p = tl.load(masters, mask=inside, other=0.0)
    m = tl.load(exp_avgs, mask=changes, other=0.0)
    v = tl.load(exp_avg_sqs, mask=changes, other=0.0)
    if has_average:  # all loads before the first store
        averages = _pointers(addresses[5], tl.float32, offsets, aligned)
        a = tl.load(averages, mask=inside, other=0.0)

    g = tl.div_rn(g, divisor)
    m += weight1 * (g - m)
    v += weight2 * (g * g - v)
    updated = p - (decay * p + step_size * tl.div_rn(m, tl.sqrt_rn(v) + epsilon))

    tl.store(masters, updated, mask=changes)
    tl.store(exp_avgs, m, mask=changes)
    tl.store(exp_avg_sqs, v, mask=changes)
    if published_type is not None:
        copies = _pointers(addresses[4], published_type, offsets, aligned)
        tl.store(copies, updated.to(published_type), mask=changes)
    if has_average:
        a += average_weight * (tl.where(changes, updated, p) - a)
        tl.store(averages, a, mask=inside)


@triton.jit
def update_chunks(
    address_table,
    sizes,
    chunk_tensors,
    chunk_starts,
    scalar_table,
    weight1,
    weight2,
    average_weight,
    num_tensors,
    gradient_type: tl.constexpr,
    published_type: tl.constexpr,
    has_average: tl.constexpr,
    chunk_size: tl.constexpr,
    block_size: tl.constexpr,
    tail_size: tl.constexpr,
):
    """One program updates one chunk of one tensor.

    Args:
        address_table: [6, num_tensors] int64, bytes; rows as `_update_block` wants them, 0 for
            what there is not.
        sizes: [num_tensors] int64, elements.
        chunk_tensors: [programs] int32, the tensor that a chunk is of.
        chunk_starts: [programs] int64, its first element, a multiple of `chunk_size`.
        scalar_table: [5, num_tensors] float32: step size, epsilon, decay, divisor of the gradients,
            and not 0 where nothing but the averages changes.
        weight1: 1 - beta1.
        weight2: 1 - beta2.
        average_weight: 1 - decay of the average.
        num_tensors: of the update.
        gradient_type: Triton's dtype of the gradients.
        published_type: of the low-precision copies; None where there are none.
        has_average: whether there are averages.
        chunk_size: elements, a multiple of `block_size`.
        block_size: elements, a power of 2.
        tail_size: the same, where elements move one by one.
    """
    chunk = tl.program_id(0)
    tensor = tl.load(chunk_tensors + chunk)
    start = tl.multiple_of(tl.load(chunk_starts + chunk), block_size)
    end = tl.minimum(start + chunk_size, tl.load(sizes + tensor))

    column = address_table + tensor
    gradient = tl.load(column)
    master = tl.load(column + num_tensors)
    exp_avg = tl.load(column + 2 * num_tensors)
    exp_avg_sq = tl.load(column + 3 * num_tensors)
    published = tl.load(column + 4 * num_tensors)
    average = tl.load(column + 5 * num_tensors)
    addresses = (gradient, master, exp_avg, exp_avg_sq, published, average)

    column = scalar_table + tensor
    step_size = tl.load(column)
    epsilon = tl.load(column + num_tensors)
    decay = tl.load(column + 2 * num_tensors)
    divisor = tl.load(column + 3 * num_tensors)
    counts = tl.load(column + 4 * num_tensors) == 0
    scalars = (step_size, epsilon, decay, divisor, weight1, weight2, average_weight)

    # Whole blocks of tensors that all begin at multiples of 16 bytes move 16 bytes at a time; what
    # is left of a tensor, and gradients or slices that begin elsewhere, element by element.
    unaligned = (gradient | master | exp_avg | exp_avg_sq | published | average) & 15
    whole = tl.where(unaligned == 0, end - (end - start) % block_size, start)
    whole = tl.multiple_of(whole, block_size)
    for first in range(start, whole, block_size):
        _update_block(
            addresses, scalars, counts, first, whole,
            gradient_type, published_type, has_average, True, block_size,
        )  # fmt: skip
    for first in range(whole, end, tail_size):
        _update_block(
            addresses, scalars, counts, first, end,
            gradient_type, published_type, has_average, False, tail_size,
        )  # fmt: skip
