"""One sample of an image shard, of whatever format, as it stands there.

Nothing is skipped: what cannot be used comes out as a sample with its `problem`, which becomes its
status in the ledger. All problems that reading a shard can find:

    no_image            no member, or value, that is an image
    empty_image         an image of zero bytes
    no_caption          no caption, an empty one, or one that is not a text
    caption_not_utf8    a caption that is no UTF-8
    broken_json         metadata that are no JSON object
    repeated_member     two neighbouring members of one key and one suffix: whose are they?
    duplicate_key       the key of an earlier sample of the shard, which is kept
    broken_shard        stands for all that is behind, or in, a damaged part of the file; its key
                        is `<rest of NAME>`, its metadata say what is wrong
    no_samples          stands for a shard that holds none; its key is `<shard NAME>`

Decoding finds more (`precompute.pixels`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from shards.column import Json

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


@dataclass(kw_only=True)
class ImageSample:
    """One sample as it stands in its shard.

    Args:
        key: its id in the shard; data, never a path.
        image: undecoded bytes of the image.
        caption: without white space around it.
        metadata: all other fields that came with it, JSON-able.
        problem: why it cannot be used; empty when it can, as far as is known undecoded.
    """

    key: str
    image: bytes | None = None
    caption: str | None = None
    metadata: Json = field(default_factory=dict)
    problem: str = ""

    def judged(self) -> Self:
        """This sample, with its problem where image or caption is missing and none is known."""
        if not self.problem:
            if not self.image:
                self.problem = "no_image" if self.image is None else "empty_image"
            elif not self.caption:
                self.problem = "no_caption"
        return self


class BrokenShardError(Exception):
    """The bytes of a shard are damaged: here reading ends."""

    def as_sample(self, shard: str) -> ImageSample:
        """What stands for all samples that cannot be read."""
        return ImageSample(
            key=f"<rest of {shard}>", metadata={"problem": str(self)}, problem="broken_shard"
        )


def sample_of_none(shard: str) -> ImageSample:
    """What stands for a shard without samples."""
    return ImageSample(key=f"<shard {shard}>", problem="no_samples")
