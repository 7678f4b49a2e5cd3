"""Which trials no other beats in both cost and loss."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other dominates, by rising cost.

    A point dominates another if it is at most as large in both and smaller in one; equal points are
    on the front together.

    Args:
        points: (cost, loss), both to be small.
    """
    front: list[int] = []
    least_loss = float("inf")
    for index in sorted(range(len(points)), key=lambda number: points[number]):
        is_twin = bool(front) and points[index] == points[front[-1]]
        if points[index][1] < least_loss or is_twin:
            front.append(index)
            least_loss = points[index][1]
    return front
