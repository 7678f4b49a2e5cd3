"""Prompts: from a text, a file, what a run held out, or the captions of COCO."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate.training_run import TrainingData, TrainingRun
from shards.dataset import Dataset
from shards.errors import UserError
from shards.held_out import HeldOut
from shards.layout import ledger_path
from shards.ledger import OK, read_ledger
from shards.row_index import ledger_rows, read_whole_ledger
from shards.storage import location, read_bytes

COCO, HELD_OUT = "coco", "held-out"
COCO_NUM_IMAGES = 30_000  # of the published protocol
_A_PROMPT_A_LINE = "a text file with a prompt in each line"


@dataclass(frozen=True)
class Prompts:
    """Prompts in the order of their ids.

    Args:
        texts: one for each image.
        keys: what each is of, in its source: `<shard>/<key>` of a dataset, the image's id in COCO;
            empty where the source has none.
    """

    texts: list[str]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, num_images: int) -> Prompts:
        """The first of them; of more than there are, each again in turn. 0: all."""
        if not num_images:
            return self
        numbers = [number % len(self.texts) for number in range(num_images)]
        keys = [self.keys[number] for number in numbers] if self.keys else []
        return Prompts([self.texts[number] for number in numbers], keys)


def load_prompts(named: str, source: str, *, num_images: int = 0, seed: int = 0) -> Prompts:
    """The prompts that a command names.

    Args:
        named: `coco:<captions_val2014.json>`; `held-out` or `held-out:<dataset>`, of the run that
            is sampled; a .jsonl file, whose objects have a `prompt` or a `caption`; else see
            `read_prompts`.
        source: the run, checkpoint or export that is sampled.
        num_images: 0: one for each prompt; more than there are take them again in turn. Of COCO,
            how many images are chosen; 0: `COCO_NUM_IMAGES`.
        seed: of the choice from COCO.

    Raises:
        UserError: they cannot be read, or there are none.
    """
    kind, colon, rest = named.partition(":")
    if kind == COCO and colon:
        return coco_prompts(rest, num_images or COCO_NUM_IMAGES, seed)
    if kind == HELD_OUT:
        run = TrainingRun(location(source))
        data = run.open_data(rest) if rest else run.data
        return held_out_prompts(data, run.held_out(data)).take(num_images)
    if named.endswith(".jsonl"):
        return _jsonl_prompts(named).take(num_images)
    return Prompts(read_prompts(named, "--prompts"), []).take(num_images)


def read_prompts(named: str, flag: str) -> list[str]:
    """Prompts from a text file, one in each line, or from a text with semicolons between them.

    Args:
        named: the file or the text. What ends in .txt, or is one word with a slash, is a file.
        flag: that it was given with, for errors.

    Raises:
        UserError: no such file, not a text, or no prompt in it.
    """
    if not _is_unicode(named):
        raise UserError(flag, f"{named!r} is not UTF-8", wanted="text, or a file with text")
    is_path = named.endswith(".txt") or ("/" in named and len(named.split()) == 1)
    text = _read_text(named, flag) if is_path or _is_file(named) else named.replace(";", "\n")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(flag, "no prompt given", wanted="text, or a file with text")
    return prompts


def _is_file(named: str) -> bool:
    """Of a name without ending; a long prompt would be no valid name at all."""
    return len(named.encode()) < 256 and Path(named).is_file()


def _is_unicode(text: str) -> bool:
    """Bytes of a command line that are no UTF-8 come as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(named: str, flag: str, wanted: str = _A_PROMPT_A_LINE) -> str:
    try:
        return read_bytes(location(named)).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        found = f"no file {named}" if named else "names no file"
    except UnicodeDecodeError:
        found = f"{named} is not UTF-8"
    raise UserError(flag, found, wanted=wanted)


def _jsonl_prompts(named: str) -> Prompts:
    wanted = 'lines such as {"prompt": "a lion"}'
    texts, keys = [], []
    for number, line in enumerate(_read_text(named, "--prompts", wanted).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["prompt"] if "prompt" in row else row["caption"]
            key = "" if row.get("key") is None else str(row["key"])
            is_text = isinstance(text, str) and _is_unicode(text + key)
        except (ValueError, TypeError, KeyError, RecursionError):
            is_text = False
        if not is_text:
            raise UserError(f"{named}, line {number}", f"no prompt: {line[:80]}", wanted=wanted)
        texts.append(text)
        keys.append(key)
    if not texts:
        raise UserError(named, "no prompts", wanted=wanted)
    return Prompts(texts, keys if any(keys) else [])


# Of a latent dataset ------------------------------------------------------------------------------


def held_out_prompts(data: TrainingData, held_out: HeldOut) -> Prompts:
    """Captions of held-out samples, in the order in which validation reads them."""
    texts, keys = [], []
    for shard, rows in held_out.rows.items():
        num_rows = data.image.shards[shard]["rows_in"]
        ledger = read_whole_ledger(data.dataset.path, shard, ["key", "caption"], num_rows)
        for number in ledger_rows(data.image, shard)[rows].tolist():
            texts.append(ledger[number]["caption"] or "")
            keys.append(f"{shard}/{ledger[number]['key']}")
    return Prompts(texts, keys)


def captions_of(dataset: Dataset, num_captions: int) -> list[str]:
    """Different captions, spread evenly over the dataset's first shards."""
    captions: dict[str, None] = {}
    for shard in sorted(dataset.ledger):
        for row in read_ledger(ledger_path(dataset.path, shard)):
            if row["status"] == OK:
                captions[row["caption"]] = None
        if len(captions) >= 20 * num_captions:
            break
    everything = list(captions)
    stride = max(1, len(everything) // num_captions)
    return everything[::stride][:num_captions]


# Of COCO ------------------------------------------------------------------------------------------


def coco_prompts(path: str, num_images: int, seed: int = 0) -> Prompts:
    """Captions as the 30k protocol takes them: one of each of 30,000 images of the validation set.

    Publications draw them at random and do not say which. Here images are ranked by the sha256 of
    `<seed>/<image id>` and the first of them taken; of an image's captions, the one whose sha256 of
    `<seed>/<caption id>` is lowest. So the choice is the same everywhere, and that of fewer images
    is the beginning of that of more.

    Args:
        path: captions_val2014.json, or another file of that format; local or a URL.
        num_images: images to choose.
        seed: of the choice.

    Raises:
        UserError: it is no such file, or has fewer images.
    """
    captions = _read_coco(path)
    if num_images > len(captions):
        raise UserError(
            path,
            f"captions of {len(captions)} images",
            wanted=f"{num_images}",
            remedy=f"--num-images {len(captions)}",
        )
    chosen = sorted(captions, key=lambda image: _rank(seed, image))[:num_images]
    of_each = (min(captions[image], key=lambda row: _rank(seed, row[0])) for image in chosen)
    # Captions of COCO come with line ends and blanks around them.
    return Prompts([" ".join(text.split()) for _, text in of_each], [str(i) for i in chosen])


def _read_coco(path: str) -> dict[int, list[tuple[int, str]]]:
    """Caption ids and captions by image id."""
    wanted = 'COCO\'s {"annotations": [{"image_id": 1, "id": 2, "caption": "…"}]}'
    captions: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)
    try:
        document: Any = json.loads(_read_text(path, "--prompts", wanted))
        for row in document["annotations"]:
            str.encode(row["caption"])  # raises where it is no text, or half a surrogate pair
            captions[int(row["image_id"])].append((int(row["id"]), row["caption"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(path, f"not captions of COCO ({error!r})", wanted=wanted) from None
    return captions


def _rank(seed: int, number: int) -> bytes:
    return hashlib.sha256(f"{seed}/{number}".encode()).digest()


def count_cut(pipeline: Any, prompts: Sequence[str]) -> int:
    """Prompts that are longer than the text encoder reads, and are cut there."""
    tokenizer = pipeline.tokenizer
    lengths = [len(ids) for ids in tokenizer(list(prompts)).input_ids]
    return sum(length > tokenizer.model_max_length for length in lengths)
