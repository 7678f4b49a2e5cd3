"""A folder of generated images, with the prompts and the settings that it was made with.

    <folder>/generation.json       settings, and what they were used with
             prompts.jsonl         {"id": 0, "prompt": "a lion", "seed": 0}, a line for each image
             images/000000.png

The first two are complete before the first image. It is complete when each id has its image.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.errors import UserError
from shards.storage import Location, list_files, location, read_bytes, write_whole

SETTINGS, PROMPTS, IMAGES = "generation.json", "prompts.jsonl", "images"

Json = dict[str, Any]


class Generated:
    """A generated folder, complete or not.

    Args:
        folder: local or behind a URL.
    """

    def __init__(self, folder: Location | str) -> None:
        self.folder = location(folder)

    @cached_property
    def settings(self) -> Json:
        """All that the images depend on but for hardware and libraries.

        Raises:
            UserError: it is no generated folder.
        """
        try:
            settings: Json = dict(json.loads(self._read(SETTINGS))["settings"])
        except (ValueError, TypeError, KeyError) as error:
            raise self._broken(f"{SETTINGS} ({error!r})") from None
        return settings

    @cached_property
    def rows(self) -> list[Json]:
        """`id`, `prompt`, `seed` and, of some sources, `key` of each image.

        Raises:
            UserError: it is no generated folder.
        """
        try:
            # Not splitlines: a prompt may hold what Unicode takes for the end of a line.
            lines = self._read(PROMPTS).removesuffix("\n").split("\n")
            rows: list[Json] = [json.loads(line) for line in lines]
            is_right = [row["id"] for row in rows] == list(range(len(rows)))
            is_right &= all(isinstance(row["prompt"], str) for row in rows)
        except (ValueError, TypeError, KeyError) as error:
            raise self._broken(f"{PROMPTS} ({error!r})") from None
        if not is_right:
            raise self._broken(f"{PROMPTS}: its ids are not 0, 1, 2, …")
        return rows

    @property
    def prompts(self) -> list[str]:
        """The prompt of each image."""
        return [row["prompt"] for row in self.rows]

    def missing(self) -> list[int]:
        """Ids without an image, ascending."""
        return sorted(set(range(len(self.rows))) - self.listed())

    def listed(self) -> set[int]:
        """Ids that have a file, whole or not."""
        found = list_files(self.folder / IMAGES)
        return {number for number in range(len(self.rows)) if image_name(number) in found}

    def iter_images(self, batch_size: int) -> Iterator[np.ndarray]:
        """All images in the order of their ids, [B, H, W, 3] uint8.

        Args:
            batch_size: B; the last batch may be smaller.

        Raises:
            UserError: one is missing or damaged.
        """
        if missing := self.missing():
            raise UserError(
                self.folder,
                f"{len(missing)} of {len(self.rows)} images missing (first {missing[0]})",
                remedy="the same `python -m evaluate generate` again makes those that are missing",
            )
        for start in range(0, len(self.rows), batch_size):
            ids = range(start, min(start + batch_size, len(self.rows)))
            yield np.stack([self.read_image(number) for number in ids])

    def read_image(self, number: int) -> np.ndarray:
        """One image, [H, W, 3] uint8.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.folder / IMAGES / image_name(number)
        try:
            with Image.open(io.BytesIO(read_bytes(path))) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(
                path,
                f"not an image ({error})",
                remedy="the same `python -m evaluate generate` again makes it anew",
            ) from None

    def write_image(self, number: int, pixels: np.ndarray) -> None:
        """Write one image, whole or not at all."""
        picture = Image.fromarray(pixels)
        path = self.folder / IMAGES / image_name(number)
        write_whole(path, lambda temporary: picture.save(temporary, format="PNG"))

    def is_intact(self, number: int) -> bool:
        """Whether the file of an image is whole.

        A local disk may have lost the end of one that was copied, or in a crash; an object store
        has whole files alone, and to fetch them all would take long.
        """
        path = self.folder / IMAGES / image_name(number)
        return not isinstance(path, Path) or _is_whole(path)

    def _read(self, name: str) -> str:
        try:
            return read_bytes(self.folder / name).decode()
        except (FileNotFoundError, NotADirectoryError):
            raise self._broken(f"no {name}") from None

    def _broken(self, found: str) -> UserError:
        return UserError(
            self.folder,
            f"not a folder of generated images ({found})",
            remedy="python -m evaluate generate --source <run> --prompts <file> --out <folder>",
        )


def image_name(number: int) -> str:
    """`000042.png`."""
    return f"{number:06d}.png"


def prompts_text(texts: Sequence[str], seed: int, keys: Sequence[str] = ()) -> str:
    """The lines of prompts.jsonl: the image of id n starts from the noise of seed + n."""
    rows: list[Json] = [
        {"id": number, "prompt": text, "seed": seed + number} for number, text in enumerate(texts)
    ]
    for row, key in zip(rows, keys, strict=False):
        row["key"] = key
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _is_whole(path: Path) -> bool:
    """Whether every chunk of a PNG matches its checksum, to the last one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that a damaged header may name
            with Image.open(path) as image:
                image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True
