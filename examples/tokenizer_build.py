"""Builds the tiny model's tokenizer: CLIP's byte-level BPE, with a vocabulary of our own.

Every word of the scene grammar is one token, so are common words of picture captions, and any
other text falls back to its UTF-8 bytes: nothing is unknown. No corpus is needed.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

from examples.grammar import words

START, END = "<|startoftext|>", "<|endoftext|>"
MODEL_MAX_LENGTH = 77
WORD_END = "</w>"
CAPTION_TEXT = """
the and with of in at to for from by is are it as or an one two three four five many
photo picture image drawing painting illustration icon symbol sign logo poster design art
man woman person people boy girl child baby family face head hair eye eyes hand hands body
animal dog cat bird fish horse lion bear cow pig sheep monkey mouse rabbit insect
tree flower plant leaf grass forest mountain river sea ocean beach sky sun moon star cloud
rain snow house home building city street road bridge room kitchen table chair bed window door wall
car bus train plane boat ship bike truck wheel food fruit cake bread drink cup glass
bottle plate
ball game sport music book phone computer screen clock camera bag box hat shirt dress shoe
light dark bright medium skin tone old new young big little long short high low round flat
pink brown gray grey gold silver blond happy sad smile smiling walking running standing sitting
top bottom front back side up down over under near behind inside view close water fire heart
tion ing ed er est ness ment able ful less ly ous al ic ist ity
"""


def caption_words() -> tuple[str, ...]:
    """Return common words, and word endings, of captions outside the grammar."""
    return tuple(CAPTION_TEXT.split())


def build_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return (token to id, merges), in the order that CLIP keeps them.

    The grammar's merges come first, so a word added later can never split a word of the grammar.
    """
    merges = _learn_merges(words(), known=[])
    merges = _learn_merges((*words(), *caption_words()), known=merges)
    letters = list(byte_letters().values())
    tokens = [*letters, *(letter + WORD_END for letter in letters)]
    tokens += [first + second for first, second in merges]
    tokens += [START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def byte_letters() -> dict[int, str]:
    """Return a printable letter for each byte, as every byte-level BPE uses them.

    Bytes that print stand for themselves; the others take letters from 256 upwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in sorted(printable)}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _learn_merges(
    vocabulary: tuple[str, ...], known: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Learn byte pair merges until every word is one token, after those already known."""
    pieces = [[*word[:-1], word[-1] + WORD_END] for word in dict.fromkeys(vocabulary)]
    for pair in known:
        pieces = [_merge(word, pair) for word in pieces]
    merges = list(known)
    while True:
        counts = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        if not counts:
            return merges
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer in the files that `CLIPTokenizer.from_pretrained` reads."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = build_vocabulary()
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab_file.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(
        folder,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=MODEL_MAX_LENGTH,
    )
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for noise in ("is_local", "local_files_only"):  # how this very object was loaded
        config.pop(noise, None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
