"""What a run's data are before they are read: items by name, and those that are bad."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from teachers.errors import UserError

REPORT = "data-report.json"
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # tabs and line ends are white space


class Item(NamedTuple):
    """One datum, not yet read.

    name: as a report names it: a file, or a place within one.
    prompt: its caption or its label, as `Codec.condition` takes it.
    image: reads its encoded bytes (PNG, JPEG, …); None where there are only prompts.
    bucket: which of the listing's sizes it is cut to.
    """

    name: str
    prompt: Any
    image: Callable[[], bytes] | None = None
    bucket: int = 0


class Bad(NamedTuple):
    """An item that was left out: its name, what kind of fault, and the reason in words."""

    name: str
    kind: str
    reason: str


@dataclass
class Listing:
    """Everything that there is to encode, in an order that depends on the data alone.

    Args:
        where: Begins a message about these data, such as "data.prompts: 'captions.txt'".
        items: The good ones, as far as can be told without reading images.
        bad: The others.
        contents: What the data are: files, by their bytes, and texts such as fingerprints.
    """

    where: str
    items: list[Item] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    contents: list[Path | str] = field(default_factory=list)

    def add(self, item: Item, captioned: bool) -> None:
        """Take an item; where captions are needed, one without is bad."""
        if captioned and (item.prompt is None or not str(item.prompt).strip()):
            self.bad.append(Bad(item.name, "empty caption", "its caption is missing or empty"))
        elif captioned and (strange := CONTROL.search(str(item.prompt))):
            reason = f"its caption holds the control character {strange[0]!r}"
            self.bad.append(Bad(item.name, "control character", reason))
        else:
            self.items.append(item)

    @property
    def total(self) -> int:
        """How many items there are, good and bad."""
        return len(self.items) + len(self.bad)

    def check_labels(self, classes: int) -> None:
        """Refuse prompts that are no label of a teacher of so many classes.

        Raises:
            UserError: naming the first such item.
        """
        for item in self.items:
            label = str(item.prompt)
            if not label.isdecimal() or int(label) >= classes:
                raise UserError(
                    f"{self.where}: {item.name} has label {label!r}; the teacher knows "
                    f"{classes} classes, 0 to {classes - 1}"
                )

    def check(self, bad: Sequence[Bad], total: int, share: float) -> None:
        """Stop once more than `share` of `total` items are bad.

        Raises:
            UserError: naming the first bad item.
        """
        if len(bad) > share * total:
            first = bad[0]
            raise UserError(
                f"{self.where}: {first.kind}: {first.name}: {first.reason}; with it {len(bad)} of "
                f"{total:,} items are bad, more than data.skip_share = {share:g} allows; "
                "mend or remove them, or raise data.skip_share"
            )


def report(total: int, bad: Sequence[Bad]) -> dict[str, Any]:
    """What was read and what was skipped, for data-report.json."""
    kinds = Counter(b.kind for b in bad)
    skipped = [b._asdict() for b in bad]
    return {"items": total, "skipped": len(bad), "by_kind": dict(kinds), "files": skipped}


def write_report(folder: Path, content: dict[str, Any]) -> None:
    """Leave the report in a folder that exists, atomically."""
    draft = folder / f".{REPORT}.{os.getpid()}"
    draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    draft.replace(folder / REPORT)
