"""The concepts: which emoji are kept, their captions, and which may be mirrored."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Any

LETTERED = {"BACK arrow", "END arrow", "ON! arrow", "SOON arrow", "TOP arrow", "ATM sign"}
TEXT = {"copyright", "registered", "trade mark", "information"}
SIDED = re.compile(
    r"left|right|clockwise|arrow|question|speech|thought|symbols|zzz|hundred|taxi|police|oncoming"
    r"|8 ball|banknote|calendar|dollar|rosette|index|white flower|moon cake"
)
MIRROR_GROUPS = {"smileys-emotion", "people-body", "animals-nature", "food-drink"}
MIRROR_SUBGROUPS = {
    "transport-ground", "transport-water", "transport-air", "sport", "clothing", "tool",
    "musical-instrument", "household", "light-video", "science", "medical", "event",
    "place-geographic", "place-building", "arts-crafts", "writing", "hotel", "award-medal",
}  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """An emoji without its style.

    Args:
        code: Its code points, in lower case, without variation selectors.
        label: Plain words, in lower case.
        tags: Plain keywords that are not words of the label.
        group: Its group in Unicode's order.
        mirrors: Whether its mirror image shows the same.
    """

    code: str
    label: str
    tags: tuple[str, ...]
    group: str
    mirrors: bool


def plain(text: str) -> str:
    """Lower case ASCII words, with single spaces and commas."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    text = re.sub(r"[:;]", ",", text.replace("'", "")).replace("&", "and").replace(".", "")
    text = re.sub(r"[^a-z0-9, ]+", " ", text)
    return re.sub(r"\s*,\s*", ", ", re.sub(r"\s+", " ", text)).strip(" ,")


def code_of(hexcode: str) -> str:
    """Code points in lower case, without the selector of the emoji form."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def left_out(entry: dict[str, Any], group: str, subgroup: str, codes: set[str]) -> str | None:
    """Why an emoji is left out, or None.

    Args:
        codes: The codes of all emoji, to find the neutral form of one with a gender.
    """
    label, code = entry["label"], code_of(entry["hexcode"])
    gendered = re.match(r"1f46[89]-200d-", code) and "1f9d1" + code[5:] in codes
    reasons = {
        "flags": group == "flags",
        "letters and parts": group in ("", "component"),
        "letters and digits": subgroup in ("keycap", "alphanum") or label in LETTERED | TEXT,
        "clocks": "o’clock" in label or (subgroup == "time" and label.endswith("-thirty")),
        "facing right": code.endswith("-200d-27a1"),
        "man or woman of a neutral form": gendered or re.search(r"-200d-264[02]$", code),
        "families and couples": re.match(r"(family|kiss|couple with heart): ", label),
        "sizes of squares and diamonds": subgroup == "geometric"
        and re.search(r"medium|small", label),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def concepts(entries: list[dict[str, Any]], meta: dict[str, Any]) -> tuple[list[Concept], Counter]:
    """The kept concepts in Unicode's order, and how many were left out for each reason.

    Args:
        entries: `en/data.json` of emojibase-data.
        meta: `meta/groups.json` of emojibase-data.
    """
    codes = {code_of(entry["hexcode"]) for entry in entries}
    kept: list[Concept] = []
    dropped: Counter[str] = Counter()
    for entry in sorted(entries, key=lambda e: e.get("order", 0)):
        group = meta["groups"].get(str(entry.get("group")), "")
        subgroup = meta["subgroups"].get(str(entry.get("subgroup")), "")
        if reason := left_out(entry, group, subgroup, codes):
            dropped[reason] += 1
            continue
        label = plain(entry["label"])
        words = set(label.replace(",", "").split())
        tags = [plain(tag) for tag in entry.get("tags", [])]
        mirrors = group in MIRROR_GROUPS or subgroup in MIRROR_SUBGROUPS
        kept.append(
            Concept(
                code_of(entry["hexcode"]),
                label,
                tuple(t for t in tags if t and not set(t.split()) & words),
                group,
                mirrors and not SIDED.search(label),
            )
        )
    return kept, dropped


def caption(style: str, label: str, *tags: str) -> str:
    """The caption of a picture, such as "flat style, red apple"."""
    return ", ".join((f"{style} style", label, *tags))
