"""What a run's data are before they are read: items by name, their labels, and what is left out."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill.console import notice
from distill.files import write
from teachers.errors import UserError

REPORT = "data-report.json"
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # tabs and line ends are white space
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character; no encoding can write it down
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
SHOWN = 12  # labels that a line names before it says how many there are

Needs = Literal["caption", "label", ""]  # what an item must come with


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
        folders: Names of class folders, with or without images in them.
        numbered: Labels by name where the place itself numbers them, as a ClassLabel column does.
        left_out: Files that are no items, though someone may expect them to be.
        labels: By the name that the data give it; known after `read_labels`.
    """

    where: str
    items: list[Item] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    contents: list[Path | str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    numbered: dict[str, int] = field(default_factory=dict)
    left_out: list[Bad] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def add(self, item: Item, needs: Needs) -> None:
        """Take an item; one that lacks what it needs, or holds it in no usable form, is bad."""
        if needs and (fault := _fault(item.prompt, needs)):
            self.bad.append(Bad(item.name, *fault))
        else:
            self.items.append(item)

    @property
    def total(self) -> int:
        """How many items there are, good and bad."""
        return len(self.items) + len(self.bad)

    def read_labels(self, classes: int) -> None:
        """Make labels of the items' prompts, for a teacher of so many classes.

        Whole numbers are the labels themselves. Otherwise the names, in sorted order, are labels
        from 0 up. That, and classes without data, are told in a line.

        Raises:
            UserError: a number is no label of the teacher's, or there are more names than classes.
        """
        given = {str(item.prompt).strip(): item.name for item in reversed(self.items)}
        folders = self._folder_names()
        names = sorted({*folders, *given})
        known = f"the teacher knows {classes} classes, 0 to {classes - 1}"
        if all(_is_number(name) for name in names):
            names.sort(key=float)
            for name in names:
                if not (name.isascii() and name.isdecimal()) or float(name) >= classes:
                    which = f"its folder {name!r} is no label"
                    if name not in folders:
                        which = f"{given[name]} has label {name!r}"
                    raise UserError(
                        f"{self.where}: {which}; {known}; number them in that range, or give all "
                        "of them names that are no numbers"
                    )
            self._refuse_spellings(names, "folders" if folders else "labels")
            self.labels = {name: int(name) for name in names}
        elif len(names) > classes:
            what = "subfolders" if folders else "different labels"
            raise UserError(
                f"{self.where} has {len(names)} {what}, such as {names[0]!r}; {known}; "
                "give one name to each class"
            )
        else:
            self.labels = {name: label for label, name in enumerate(names)}
            said = _listed([f"{label} is {name!r}" for name, label in self.labels.items()])
            notice(f"{self.where}: labels are its names in sorted order: {said}")
        read = [i._replace(prompt=self.labels[str(i.prompt).strip()]) for i in self.items]
        self.items = read
        self._tell_classes({item.prompt for item in read}, classes)
        if self.numbered:
            self.labels = self.numbered

    def _folder_names(self) -> set[str]:
        """The names of class folders as labels have them: without blanks around them.

        Raises:
            UserError: two of them, or all of one, are nothing but blanks apart.
        """
        names: dict[str, str] = {}
        for folder in self.folders:
            if not (name := folder.strip()):
                raise UserError(f"{self.where}: its folder {folder!r} has no name; rename it")
            if (other := names.setdefault(name, folder)) != folder:
                raise UserError(
                    f"{self.where}: its folders {other!r} and {folder!r} differ in blanks alone; "
                    "merge them, or rename one"
                )
        return set(names)

    def _refuse_spellings(self, numbers: list[str], what: str) -> None:
        """Refuse two spellings of one label, such as 1 and 01.

        Raises:
            UserError: naming both.
        """
        seen: dict[int, str] = {}
        for name in numbers:
            if (other := seen.setdefault(int(name), name)) != name:
                raise UserError(
                    f"{self.where}: its {what} {other!r} and {name!r} are one number; "
                    "merge them, or renumber one"
                )

    def _tell_classes(self, present: set[int], classes: int) -> None:
        """Say which classes there are data of, where it is not all."""
        if 0 < len(present) < classes:
            notice(
                f"{self.where}: of the teacher's {classes} classes, {len(present)} have data: "
                f"{_listed([str(label) for label in sorted(present)])}"
            )

    def tell_left_out(self) -> None:
        """Say what kinds of files are left out, how many, and name one of each."""
        kinds: dict[str, list[Bad]] = {}
        for file in self.left_out:
            kinds.setdefault(file.kind, []).append(file)
        for kind, files in kinds.items():
            count, name = len(files), files[0].name
            which = f"{count} files are left out ({kind}), such as" if count > 1 else f"{kind}:"
            notice(f"{self.where}: {which} {name}: {files[0].reason}")

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

    def report(self, total: int, bad: Sequence[Bad], firsts: Sequence[str]) -> dict[str, Any]:
        """What was read and what was not, for data-report.json.

        Args:
            total: How many items there were, good and bad.
            firsts: Names of items of which the first frame of several was read.
        """
        return {
            "items": total,
            "skipped": len(bad),
            "by_kind": dict(Counter(b.kind for b in bad)),
            "files": [b._asdict() for b in bad],
            "left_out": [b._asdict() for b in self.left_out],
            "first_frames": list(firsts),
            "labels": self.labels,
        }


def _fault(prompt: Any, needs: Needs) -> tuple[str, str] | None:
    """The kind of fault and the reason for which a prompt is no caption or no label."""
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        kind = "empty caption" if needs == "caption" else "missing label"
        return kind, f"its {needs} is missing or empty"
    if not isinstance(prompt, str):
        if needs == "label" and isinstance(prompt, int) and not isinstance(prompt, bool):
            return None
        want = "text" if needs == "caption" else "a whole number or a name"
        shown = ascii(prompt)
        shown = shown if len(shown) <= 40 else f"{shown[:39]}…"
        return (
            f"no {needs}",
            f"its {needs} is {shown}, of type {type(prompt).__name__}; give {want}",
        )
    if strange := CONTROL.search(prompt):
        return "control character", f"its {needs} holds the control character {strange[0]!r}"
    if half := SURROGATE.search(prompt):
        return "lone surrogate", f"its {needs} holds {half[0]!a}, which is half a character"
    return None


def _is_number(name: str) -> bool:
    """Whether a name is a number as people write one; "nan", "inf" and "1_0" are names."""
    return NUMBER.fullmatch(name) is not None


def _listed(words: list[str]) -> str:
    """The first of some words, and how many more there are."""
    more = len(words) - SHOWN
    return ", ".join(words[:SHOWN]) + (f" and {more:,} more, in {REPORT}" if more > 0 else "")


def write_report(folder: Path, content: dict[str, Any]) -> None:
    """Leave the report in a folder that exists, atomically.

    A file's name may hold bytes of no encoding; they are written as JSON's own escapes.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write(folder / REPORT, text.encode("utf-8", "backslashreplace").decode())


def check_labels(folder: Path, content: dict[str, Any]) -> None:
    """Refuse to go on with a run whose names stood for other labels when it began.

    Raises:
        UserError: naming one whose label has changed.
    """
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    before = report.get("labels") if isinstance(report, dict) else None
    if not isinstance(before, dict):
        return
    now = content["labels"]
    for name in before.keys() & now.keys():
        if before[name] != now[name]:
            raise UserError(
                f"--resume: label {before[name]} was {name!r} when the run in {folder} began, and "
                f"{name!r} is {now[name]} now; give the data the names that they had"
            )
