"""Captions as a slot grammar: new captions from the phrases of some.

A caption is a subject, then phrases that a preposition begins, then phrases after commas:
"a fox with a scarf on a hill, soft light" is a subject, an attribute, a setting and an addition.
A new caption takes the form of one caption, and for each of its slots a phrase of that kind from
any of them.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

SETTINGS = ("in", "on", "at", "under", "over", "by", "near", "behind", "beside")
ATTRIBUTES = ("with", "of", "wearing", "holding")
PREPOSITION = re.compile(rf"\s+(?=(?:{'|'.join(SETTINGS + ATTRIBUTES)})\s)", re.IGNORECASE)
ARTICLES = {"a", "an", "the"}
SHARED = 0.8  # a phrase in this share of the captions is their trigger
HELD_OUT = 0.2  # share of the phrases of each kind that no prompt has
LEAST = 5  # of a kind with fewer phrases, none is held out
PHRASE_DROPOUT, CAPTION_DROPOUT = 0.2, 0.05
TRIES = 20  # per new caption, before the captions are taken to be exhausted

Slot = tuple[str, str]  # the kind and the phrase


@dataclass
class Grammar:
    """The phrases of some captions.

    trigger: The words that all begin with, or the phrase that most have; they stay as they are and
        come first. Empty if there are none.
    joint: What stands between the trigger and the rest: a blank or a comma.
    forms: The kinds of each caption's slots.
    pools: The phrases of each kind, sorted.
    """

    trigger: str = ""
    joint: str = " "
    forms: list[tuple[str, ...]] = field(default_factory=list)
    pools: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, captions: Sequence[str]) -> Grammar:
        """The grammar of captions."""
        captions = [" ".join(c.split()).strip(" ,") for c in captions]
        trigger, joint, rests = _without_trigger([c for c in captions if c])
        grammar = cls(trigger, joint)
        pools: dict[str, set[str]] = {}
        for rest in rests:
            slots = slots_of(rest)
            grammar.forms.append(tuple(kind for kind, _ in slots))
            for kind, phrase in slots:
                pools.setdefault(kind, set()).add(phrase)
        grammar.pools = {kind: sorted(pools[kind]) for kind in sorted(pools)}
        return grammar

    def caption(self, rng: random.Random, pools: dict[str, list[str]], dropout: float) -> str:
        """A new caption.

        Args:
            pools: The phrases to take, by kind; a slot without any is left out.
            dropout: The probability that a slot other than the subject is left out.
        """
        slots: list[Slot] = []
        for kind in rng.choice(self.forms):
            drop = kind != "subject" and rng.random() < dropout
            free = [p for p in pools.get(kind, ()) if (kind, p) not in slots]
            if free and not drop:
                slots.append((kind, rng.choice(free)))
        return self._text(slots)

    def _text(self, slots: Sequence[Slot]) -> str:
        text = self.trigger
        for number, (kind, phrase) in enumerate(slots):
            joint = self.joint if number == 0 else ", " if kind == "addition" else " "
            text = f"{text}{joint}{phrase}" if text else phrase
        return text


def slots_of(caption: str) -> list[Slot]:
    """The subject and the phrases of a caption, with their kinds."""
    first, *additions = [part.strip() for part in caption.split(",") if part.strip()] or [""]
    subject, *phrases = PREPOSITION.split(first)
    slots = [("subject", subject)] if subject else []
    for phrase in phrases:
        word = phrase.split(maxsplit=1)[0].lower()
        slots.append(("setting" if word in SETTINGS else word, phrase))
    return slots + [("addition", part) for part in additions]


def _without_trigger(captions: list[str]) -> tuple[str, str, list[str]]:
    """The captions' trigger, what follows it, and the captions without it."""
    common: list[str] = []
    for words in zip(*(c.split() for c in captions), strict=False):
        if len(set(words)) > 1 or len(captions) < 2:
            break
        common.append(words[0])
    while common and common[-1].lower() in ARTICLES:
        common.pop()
    if common:
        lead = " ".join(common)
        rests = [c[len(lead) :].strip(" ,") for c in captions]
        return lead.rstrip(","), ", " if lead.endswith(",") else " ", rests
    parts = [[p.strip() for p in c.split(",")] for c in captions]
    counts = Counter(p for some in parts for p in set(some))
    for phrase in sorted(counts, key=lambda p: (-counts[p], p)):
        if counts[phrase] < max(2, SHARED * len(captions)):
            break
        return phrase, ", ", [", ".join(p for p in some if p != phrase) for some in parts]
    return "", " ", captions


@dataclass(frozen=True)
class Expansion:
    """New captions, and the phrases that none of them has.

    captions: Distinct captions; an empty one stands for a caption that is dropped as a whole.
    held_out: Phrases kept for tests.
    tests: Captions that each have one of them.
    """

    grammar: Grammar
    captions: list[str]
    held_out: list[str]
    tests: list[str]


def expand(
    captions: Sequence[str], count: int, seed: int, tests: int = 64, held_out: float = HELD_OUT
) -> Expansion:
    """New captions from the phrases of some, deterministic in the arguments.

    Args:
        count: The largest number of new captions; there are fewer if the phrases allow no more.
        tests: The largest number of captions with held-out phrases.
        held_out: The share of the phrases of each kind that no new caption has.
    """
    grammar, rng = Grammar.of(captions), random.Random(seed)
    kept, held = {}, {}
    for kind, phrases in grammar.pools.items():
        shuffled = rng.sample(phrases, len(phrases))
        number = round(held_out * len(phrases)) if len(phrases) >= LEAST else 0
        held[kind], kept[kind] = sorted(shuffled[:number]), sorted(shuffled[number:])
    made = _distinct(lambda: grammar.caption(rng, kept, PHRASE_DROPOUT), count)
    every = sorted(p for phrases in held.values() for p in phrases)

    def test() -> str:
        kind = rng.choice([k for k, phrases in held.items() if phrases])
        return grammar.caption(rng, {**kept, kind: held[kind]}, 0.0)

    found = _distinct(test, tests, lambda c: any(p in c for p in every)) if every else []
    return Expansion(grammar, made, every, found)


def _distinct(make: Callable[[], str], count: int, good: Callable[[str], Any] = bool) -> list[str]:
    """Up to `count` distinct values that are good; it ends when `make` gives no new ones."""
    made: dict[str, None] = {}
    for _ in range(TRIES * count):
        if len(made) == count:
            break
        if good(value := make()):
            made.setdefault(value)
    return list(made)
