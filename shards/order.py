"""The order of samples: a pure function of (seed, epoch), the same for any number of processes.

The shards (pieces of them, where they are few) are permuted anew every epoch and laid end to end.
That line is cut into P *canonical partitions* of equal length; every global batch takes
global_batch_size / P consecutive positions from each partition, and within a partition the samples
are shuffled in windows. A rank of world_size serves P / world_size neighbouring partitions, so
it reads a few shards at a time, and all ranks together see what one process would see.

Nothing is stored: a step's samples are computed from its number, in O(number of shards) memory.

The remainder: an epoch of N samples leaves out N mod P of them (P is at most 64 by default), other
ones every epoch; none is repeated within an epoch. Batches run on across the end of an epoch.

Rows that are held out (`shards.held_out`) are no part of the line: what is left of their shards is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shards.errors import UserError

DEFAULT_MAX_PARTITIONS = 64
DEFAULT_WINDOW = 16_384  # samples; 1 to 16 shards of the usual sizes

# What a stream of random bits is for; part of its seed.
_EPOCH, _WINDOW = 0, 1


def choose_partitions(global_batch_size: int, requested: int = 0) -> int:
    """P, a function of the global batch alone, so that every world size sees one order.

    Args:
        global_batch_size: samples per step over all processes.
        requested: an explicit P; 0 chooses the divisor of the batch up to 64 with the largest
            power of two in it, because machines come in powers of two.

    Raises:
        UserError: `requested` does not divide the batch.
    """
    if requested:
        if requested < 0 or global_batch_size % requested:
            raise UserError(
                "--num-partitions",
                f"{requested}",
                wanted=f"a divisor of the global batch {global_batch_size}",
            )
        return requested
    divisors = [p for p in range(1, DEFAULT_MAX_PARTITIONS + 1) if global_batch_size % p == 0]
    return max(divisors, key=lambda p: (p & -p, p))


def positions_of_rank(
    global_batch_size: int, num_partitions: int, rank: int, world_size: int
) -> range:
    """The positions of the global batch that one rank serves.

    Raises:
        UserError: the ranks cannot share the batch, or its partitions, evenly.
    """
    if global_batch_size % world_size:
        below = global_batch_size // world_size * world_size
        nearest = " or ".join(str(size) for size in (below, below + world_size) if size)
        raise UserError(
            "--global-batch-size",
            f"{global_batch_size} does not divide among {world_size} processes",
            remedy=f"--global-batch-size {nearest}",
        )
    if num_partitions % world_size:
        raise UserError(
            "--num-partitions",
            f"{num_partitions} partitions do not divide among {world_size} processes",
            remedy=f"start with --num-partitions {world_size} (another order: not in mid-run)",
        )
    share = global_batch_size // world_size
    return range(rank * share, (rank + 1) * share)


def _permutation(length: int, *seed: int) -> np.ndarray:
    """From raw generator bits, which numpy fixes across releases; its own shuffles may change."""
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(length)
    return np.argsort(bits, kind="stable")


@dataclass(frozen=True)
class _Epoch:
    """The pieces in the order of one epoch: shard, first row, and where each starts on the line."""

    shards: np.ndarray
    first_rows: np.ndarray
    starts: np.ndarray


class SampleOrder:
    """Which sample stands at which position of which step.

    Args:
        lengths: rows of each shard, in the order of their names.
        seed: of the run.
        global_batch_size: samples per step over all processes.
        num_partitions: P, from `choose_partitions`.
        window: samples that are shuffled together within a partition.
        held_out: rows that never appear, ascending, by the index of their shard.

    Raises:
        UserError: fewer samples than partitions.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        seed: int,
        global_batch_size: int,
        num_partitions: int,
        window: int = DEFAULT_WINDOW,
        held_out: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        assert global_batch_size % num_partitions == 0
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.num_partitions = num_partitions
        self.window = window
        held_out = held_out or {}
        # How many rows stay before each held-out one: what to search, to get over it.
        self._kept_before = {s: rows - np.arange(len(rows)) for s, rows in held_out.items()}
        lengths = np.array(lengths, dtype=np.int64)
        for shard, rows in held_out.items():
            lengths[shard] -= len(rows)
        num_samples = int(np.sum(lengths))
        self.partition_length = num_samples // num_partitions
        if self.partition_length == 0:
            raise UserError(
                "dataset",
                f"{num_samples} samples",
                wanted=f"at least {num_partitions}, one for each partition of the batch",
                remedy=f"--global-batch-size {max(num_samples, 1)} or smaller, or more images",
            )
        self._pieces = _cut_into_pieces(lengths, 4 * num_partitions)
        self._epoch = lru_cache(maxsize=2)(self._lay_out_epoch)
        self._shuffled = lru_cache(maxsize=2 * num_partitions)(self._shuffle_window)

    @property
    def samples_per_epoch(self) -> int:
        """N - N mod P."""
        return self.partition_length * self.num_partitions

    def epoch_at(self, step: int) -> float:
        """Epochs completed when `step` steps are done."""
        return step * self.global_batch_size / self.samples_per_epoch

    def locate(self, step: int, positions: range) -> tuple[np.ndarray, np.ndarray]:
        """The samples at some positions of one step's global batch.

        Args:
            step: 0 is the first.
            positions: contiguous range within [0, global_batch_size).

        Returns:
            shard index and row within the shard, int64 [len(positions)] each.
        """
        shards, rows = self.locate_steps(step, 1, positions)
        return shards[0], rows[0]

    def locate_steps(
        self, first_step: int, num_steps: int, positions: range
    ) -> tuple[np.ndarray, np.ndarray]:
        """`locate` for several steps at once, at nearly the cost of one.

        Returns:
            shard index and row within the shard, int64 [num_steps, len(positions)] each.
        """
        at = np.asarray(positions, dtype=np.int64)
        steps = np.arange(first_step, first_step + num_steps, dtype=np.int64)[:, None]
        per_partition = self.global_batch_size // self.num_partitions
        turn = (steps * per_partition + at % per_partition).ravel()
        partition = np.tile(at // per_partition, num_steps)
        epoch, offset = np.divmod(turn, self.partition_length)
        shards, rows = np.empty_like(turn), np.empty_like(turn)
        group = np.stack([epoch, partition, offset // self.window])
        for key in np.unique(group, axis=1).T:
            members = np.flatnonzero((group == key[:, None]).all(axis=0))
            places = self._shuffled(*map(int, key))[offset[members] % self.window]
            layout = self._epoch(int(key[0]))
            piece = np.searchsorted(layout.starts, places, side="right") - 1
            shards[members] = layout.shards[piece]
            rows[members] = layout.first_rows[piece] + places - layout.starts[piece]
        self._step_over_held_out(shards, rows)
        shape = (num_steps, len(positions))
        return shards.reshape(shape), rows.reshape(shape)

    def _step_over_held_out(self, shards: np.ndarray, rows: np.ndarray) -> None:
        """Turn numbers among the rows that stay into rows of the whole shard, in place."""
        concerned = np.isin(shards, list(self._kept_before))
        for shard in set(shards[concerned].tolist()):
            members = shards == shard
            kept_before = self._kept_before[shard]
            rows[members] += np.searchsorted(kept_before, rows[members], side="right")

    def shards_ahead(self, step: int, positions: range) -> Iterator[tuple[int, np.ndarray]]:
        """What a rank reads from a step on, window by window, without end.

        All of a window's shards are needed at about the same time; the next window's only later.

        Args:
            step: where to begin.
            positions: the rank's positions of each global batch.

        Returns:
            for each window the first step that needs it, and the indices of its shards.
        """
        per_partition = self.global_batch_size // self.num_partitions
        partitions = range(positions.start // per_partition, -(-positions.stop // per_partition))
        epoch, offset = divmod(step * per_partition, self.partition_length)
        window = offset // self.window
        while True:
            begins = (epoch * self.partition_length + window * self.window) // per_partition
            shards = np.concatenate([self._shards_of(epoch, p, window) for p in partitions])
            yield begins, np.unique(shards)
            window += 1
            if window * self.window >= self.partition_length:
                epoch, window = epoch + 1, 0

    def _shards_of(self, epoch: int, partition: int, window: int) -> np.ndarray:
        """Indices of the shards that one window of one partition draws from."""
        first, length = self._place_window(partition, window)
        layout = self._epoch(epoch)
        pieces = np.searchsorted(layout.starts, [first, first + length - 1], side="right") - 1
        shards: np.ndarray = layout.shards[pieces[0] : pieces[1] + 1]
        return shards

    def _place_window(self, partition: int, window: int) -> tuple[int, int]:
        """Where a window begins on the epoch's line, and how many samples it has."""
        within = window * self.window
        length = min(self.window, self.partition_length - within)
        return partition * self.partition_length + within, length

    def _lay_out_epoch(self, epoch: int) -> _Epoch:
        shards, first_rows, lengths = self._pieces
        order = _permutation(len(lengths), self.seed, _EPOCH, epoch)
        starts = np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
        return _Epoch(shards[order], first_rows[order], starts)

    def _shuffle_window(self, epoch: int, partition: int, window: int) -> np.ndarray:
        """Places on the epoch's line, shuffled within one window of one partition."""
        first, length = self._place_window(partition, window)
        return first + _permutation(length, self.seed, _WINDOW, epoch, partition, window)


def _cut_into_pieces(lengths: np.ndarray, wanted: int) -> tuple[np.ndarray, ...]:
    """Shards, or equal row ranges of them where there are fewer shards than `wanted`."""
    per_shard = max(1, -(-wanted // max(len(lengths), 1)))
    cuts = lengths[:, None] * np.arange(per_shard + 1) // per_shard
    shards = np.repeat(np.arange(len(lengths)), per_shard)
    first_rows, piece_lengths = cuts[:, :-1].ravel(), np.diff(cuts, axis=1).ravel()
    kept = piece_lengths > 0
    return shards[kept], first_rows[kept], piece_lengths[kept]
