"""The prompts of a run from 20 to 200 captions: expanded ones and neutral ones."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.console import print_notice
from distill.data.expansion.grammar import CAPTION_DROPOUT, HELD_OUT, Expansion, expand
from distill.files import write
from distill.seeds import seed_of
from eval.text import decoded, lines
from teachers.errors import UserError, clipped
from teachers.storage.files import home

FILE = "prompts.json"  # in the run's folder
COUNT = 2000  # prompts of a run
NEUTRAL = 0.4  # share of them that are neutral, without the trigger
USUAL = (20, 200)  # numbers of captions for which this is meant


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run, and where they come from.

    prompts: In the order in which they are encoded; some come several times.
    captions: How many the user gave.
    neutral: How many of the prompts are neutral.
    """

    prompts: list[str]
    captions: int
    neutral: int
    expansion: Expansion

    def summary(self) -> str:
        """Their numbers, for a line on the terminal."""
        grammar = self.expansion.grammar
        trigger = f"trigger {grammar.trigger!r}" if grammar.trigger else "no trigger"
        phrases = sum(map(len, grammar.pools.values()))
        distinct = len(self.expansion.captions)
        return (
            f"data.captions: {self.captions} captions, {trigger}, {phrases} phrases of which "
            f"{len(self.expansion.held_out)} are held out; {len(self.prompts):,} prompts: "
            f"{len(self.prompts) - self.neutral:,} of {distinct:,} new captions, "
            f"{self.neutral:,} neutral"
        )


def expanded(place: str, neutral: Sequence[str], seed: int, held_out: float = HELD_OUT) -> Prompts:
    """The prompts of a run from captions; prints nothing.

    Args:
        place: The value of `data.captions`: a folder of .txt files, or a text file.
        neutral: Prompts without the trigger, which keep the rest of the model as it is.
        held_out: The share of the phrases of each kind that no prompt has.

    Raises:
        UserError: there are no captions.
    """
    captions = read_captions(place)
    count, captions_seed = round(COUNT * (1 - NEUTRAL)), seed_of(seed, "captions")
    expansion = expand(captions, count, captions_seed, held_out=held_out)
    rng = random.Random(seed_of(seed, "prompts"))
    own = _filled(expansion.captions, round(COUNT * (1 - NEUTRAL)), rng)
    own = ["" if rng.random() < CAPTION_DROPOUT else c for c in own]
    trigger = expansion.grammar.trigger
    free = [p for p in neutral if not trigger or trigger.lower() not in p.lower()]
    others = _filled(free, COUNT - len(own), rng) if free else []
    prompts = own + others
    rng.shuffle(prompts)
    return Prompts(prompts, len(captions), len(others), expansion)


def read_captions(place: str) -> list[str]:
    """The captions in a folder's .txt files, one in each, or in the lines of a text file.

    Raises:
        UserError: there are none, or a file is not text.
    """
    path = home(place, "data.captions")
    where = f"data.captions: {clipped(place)}"
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() == ".txt" and p.is_file())
        captions = [" ".join(_text(file, where).split()) for file in files]
    elif path.is_file():
        captions = [" ".join(line.split()) for line in lines(_text(path, where))]
    else:
        raise UserError(
            f"{where}: no such folder or file; give a folder of .txt files, or a text file with a "
            "caption on each line (or data.source, whose captions this key names)"
        )
    captions = [c for c in captions if c.strip(" ,")]
    if not captions:
        raise UserError(f"{where} holds no captions in .txt; give 20 to 200")
    return captions


def _text(file: Path, where: str) -> str:
    try:
        return decoded(file.read_bytes())
    except OSError as error:
        raise UserError(f"{where}: {file.name} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{where}: {file.name} {error}") from None


def _filled(values: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` values: all of them as often as possible, and the rest at random."""
    whole, rest = divmod(count, len(values))
    return [*values] * whole + rng.sample([*values], rest)


def print_summary(prompts: Prompts) -> None:
    """Print their numbers, and a notice where captions are few or many; in the first process."""
    if os.environ.get("RANK", "0") != "0":
        return
    print_notice(prompts.summary())
    low, high = USUAL
    if not low <= prompts.captions <= high:
        remedy = (
            "more of them cover more" if prompts.captions < low else "data.prompts takes a list"
        )
        print_notice(f"data.captions: {prompts.captions} captions are outside {low} to {high}; "
                     f"{remedy}")  # fmt: skip


def write_prompts(prompts: Prompts, folder: Path) -> None:
    """Write what a run was trained on into its folder, and the phrases that it never saw."""
    expansion = prompts.expansion
    content = {
        "captions": prompts.captions,
        "neutral": prompts.neutral,
        "trigger": expansion.grammar.trigger,
        "phrases": expansion.grammar.pools,
        "held_out_phrases": expansion.held_out,
        "held_out_prompts": expansion.tests,
        "prompts": prompts.prompts,
    }
    write(folder / FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
