"""The samples of image shards in the order of a training run, each within reach by its place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from threading import Lock

import numpy as np

from precompute.pixels import UnusableImageError
from shards.column import ImageColumn
from shards.dataset import Column
from shards.errors import UserError
from shards.image_index import ShardIndex
from shards.image_sample import ImageSample
from shards.order import SampleOrder
from shards.reader import LatentReader
from shards.receipt import read_receipt, receipt_path

_LOOK_AT = 20  # samples for each caption that is wanted: many have the same

Decode = Callable[[bytes], np.ndarray]


@dataclass(frozen=True)
class ShardRows:
    """The rows of one image shard that training takes.

    Args:
        name: of the shard.
        index: of all of its rows.
        rows: those that are taken, ascending.
    """

    name: str
    index: ShardIndex
    rows: np.ndarray

    def read(self, row: int) -> ImageSample:
        """The `row`-th of those that are taken."""
        return self.index.read(int(self.rows[row]))


@dataclass(frozen=True)
class DecodedImage:
    """What a step takes of a sample.

    Args:
        number: of the sample in the whole of the shards.
        square: uint8 [H, W, 3].
        caption: as it stands in the shard.
    """

    number: int
    square: np.ndarray
    caption: str


class OnlineSamples:
    """Reads samples by shard and row.

    A header may be good and the pixels behind it not. Then the next row of the shard takes the
    sample's place: always the same one, so a run that is resumed sees what it would have seen.

    Args:
        open_shard: gives the rows of a shard by its number; is called by several threads.
        lengths: rows of each shard.
        order: over these lengths.
        identity: of the shards and of the order.
        say: takes a line for the user; each process has its own to say.
    """

    def __init__(
        self,
        open_shard: Callable[[int], ShardRows],
        lengths: np.ndarray,
        order: SampleOrder,
        identity: str,
        say: Callable[[str], object] = print,
    ) -> None:
        self.order, self.identity = order, identity
        self._open_shard, self._lengths, self._say = open_shard, lengths, say
        self._first_sample = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self._undecodable: dict[int, str] = {}  # by number
        self._num_said = 0
        self._lock = Lock()

    def keys_of(self, samples: np.ndarray) -> list[str]:
        """`<shard>/<key>` of samples by their numbers."""
        return [
            f"{rows.name}/{rows.read(row).key}" for rows, row in map(self._find, samples.tolist())
        ]

    def captions(self, num_captions: int) -> list[str]:
        """Different captions, spread evenly over the samples; fewer where there are fewer."""
        num_samples = int(self._lengths.sum())
        wanted = min(_LOOK_AT * num_captions, num_samples)
        found: dict[str, None] = {}
        for number in range(wanted):
            rows, row = self._find(number * num_samples // wanted)
            found[rows.read(row).caption or ""] = None
        return list(found)[:: max(1, len(found) // max(num_captions, 1))][:num_captions]

    def decode(self, shard: int, row: int, decode: Decode) -> DecodedImage:
        """One sample, or the one that takes its place.

        Args:
            shard: its number.
            row: within those of the shard.
            decode: from an image file's bytes to its square.

        Raises:
            UserError: none of the shard's images can be decoded, or it has changed.
        """
        rows, length = self._open_shard(shard), int(self._lengths[shard])
        for candidate in ((row + ahead) % length for ahead in range(length)):
            number = int(self._first_sample[shard]) + candidate
            if number in self._undecodable:
                continue
            sample = rows.read(candidate)
            if sample.problem:
                raise _has_changed(rows.name, sample)
            assert sample.image is not None
            assert sample.caption is not None
            try:
                return DecodedImage(number, decode(sample.image), sample.caption)
            except UnusableImageError as error:
                self._leave_out(number, f"{rows.name}/{sample.key}", error.reason)
        raise UserError(
            rows.name,
            f"none of its {length} images can be decoded",
            remedy="leave this shard out of --online",
        )

    def say_what_was_replaced(self) -> None:
        """Say how many images could not be decoded, if that is more than was said before."""
        with self._lock:
            if len(self._undecodable) > self._num_said:
                self._say_it("")

    def _find(self, number: int) -> tuple[ShardRows, int]:
        """The shard that a sample is in, and its row there."""
        shard = int(np.searchsorted(self._first_sample, number, side="right")) - 1
        return self._open_shard(shard), number - int(self._first_sample[shard])

    def _leave_out(self, number: int, key: str, reason: str) -> None:
        with self._lock:
            if number in self._undecodable:
                return
            self._undecodable[number] = reason
            if len(self._undecodable) >= 2 * self._num_said:  # a bad corpus must not fill the log
                self._say_it(f"; {key} is the last")

    def _say_it(self, note: str) -> None:
        self._num_said = len(self._undecodable)
        self._say(
            f"online: {self._num_said:,} images could not be decoded, the next of their shards "
            f"took their places ({counted(Counter(self._undecodable.values()))}){note}"
        )


def counted(reasons: Counter[str]) -> str:
    """`3 too_small, 1 no_caption`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


def samples_of_dataset(
    reader: LatentReader, image: Column[ImageColumn], caption_field: str = ""
) -> OnlineSamples:
    """The samples that a latent dataset was made from, in the order in which its reader has them.

    Args:
        reader: of the dataset.
        image: its image column; names the image shards.
        caption_field: the dataset's.
    """
    names = sorted(image.shards)

    @cache
    def open_shard(shard: int) -> ShardRows:
        name = names[shard]
        url = read_receipt(receipt_path(image.path_of(name))).source["url"]
        rows = np.array(image.map_shard(name)["row"])
        return ShardRows(name, ShardIndex(url, caption_field), rows)

    lengths = np.array([image.shards[name]["rows"] for name in names], dtype=np.int64)
    return OnlineSamples(open_shard, lengths, reader.order, reader.identity)


def _has_changed(shard: str, sample: ImageSample) -> UserError:
    return UserError(
        f"{shard}/{sample.key}",
        f"is not usable any more ({sample.problem})",
        wanted="the image shard as it was when it was indexed, or precomputed",
        remedy="put it back, or start again from the shards that are there now",
    )
