"""A CLIP tokenizer for given captions: its alphabet, its merges, its files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor


def clip_tokenizer(captions: Sequence[str], length: int) -> Any:
    """A CLIPTokenizer with one token for each word of the captions, for `length` tokens of text.

    Its vocabulary is built like CLIP's: every byte, every byte at the end of a word, then merges by
    rank. Any text can be tokenised.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    merges = merges_of({word for caption in captions for word in caption.split()})
    alphabet = sorted(ByteLevel.alphabet())
    names = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    with TemporaryDirectory() as folder:  # every version of transformers reads files
        write_vocabulary(Path(folder), {name: i for i, name in enumerate(names)}, merges)
        return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def merges_of(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, best rank first, that make each word one token."""
    merges: list[tuple[str, str]] = []
    for word in sorted(words):
        symbols = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:  # earlier merges have a better rank, and apply first
            symbols = merge(symbols, pair)
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols = merge(symbols, merges[-1])
    return merges


def write_vocabulary(
    folder: Path, vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]
) -> None:
    """Write CLIP's vocab.json and merges.txt, which every version of transformers reads."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """The symbols with every occurrence of the pair joined."""
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def tokens(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token ids (N, L), padded as the pipeline pads them."""
    length = tokenizer.model_max_length
    return tokenizer(
        list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
