"""A run's data before they are read: items by name, their labels, and the files left out."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill.console import print_notice
from distill.files import write
from eval.images import is_unread
from teachers.errors import UserError

REPORT = "data-report.json"
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # not tabs and line ends, which are blanks
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no encoding can write
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
SHOWN = 12  # labels that a message lists; of more, it gives the number
UNREAD = "its format is not read; save it as PNG or JPEG"
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")

Needs = Literal["caption", "label", ""]  # what each item needs; "" is nothing


class Item(NamedTuple):
    """One datum, not yet read.

    name: Its file, or its place in a file, as reports name it.
    prompt: Its caption or its label, as `Codec.condition` takes it.
    image: Reads its encoded bytes (PNG, JPEG, …); None if there are only prompts.
    bucket: Index of the size that its image is cropped to.
    picture: Reads the bytes of the picture that its prompt comes with; None if it has none.
    mask: Reads the bytes of that picture's mask, or is the number of one that is drawn.
    """

    name: str
    prompt: Any
    image: Callable[[], bytes] | None = None
    bucket: int = 0
    picture: Callable[[], bytes] | None = None
    mask: Callable[[], bytes] | int | None = None


class Partners(NamedTuple):
    """What comes with each image, for a teacher that takes a picture with each prompt.

    takes: What the teacher takes: a picture to "edit", or one with a "mask".
    targets, masks: As `data.targets` and `data.masks` have them.
    """

    takes: Literal["edit", "mask"]
    targets: str | None = None
    masks: str | None = None

    @property
    def place(self) -> str | None:
        """The folder or the column of the partners; None where there are none."""
        return self.targets if self.takes == "edit" else self.masks

    @property
    def key(self) -> str:
        """The recipe's key that names it."""
        return "data.targets" if self.takes == "edit" else "data.masks"

    def joined(self, item: Item, number: int, partner: Callable[[], bytes] | None) -> Item:
        """An item whose image is the picture of its prompt, with its partner.

        Args:
            number: Of the item in the data; masks that are drawn depend on it.
            partner: Reads the edited picture, or the mask; None where there is no file.
        """
        if self.takes == "edit":
            return item._replace(picture=item.image, image=partner)
        return item._replace(picture=item.image, mask=number if partner is None else partner)


class BadItem(NamedTuple):
    """An item or a file that is left out: its name, the kind of fault, and the reason."""

    name: str
    kind: str
    reason: str


@dataclass
class Listing:
    """All items to encode, in an order that depends only on the data.

    Args:
        where: Begins messages about these data, such as "data.prompts: 'captions.txt'".
        items: The good items, as far as can be known without reading images.
        bad: The other items.
        contents: What the items are read from: files, whose bytes count, and fingerprints.
        folders: Names of class folders, including empty ones.
        numbered: Labels by name, if the data number them, as a ClassLabel column does.
        left_out: Files that are not items, although a user may expect that.
        labels: Label numbers by the names in the data; set by `read_labels`.
    """

    where: str
    items: list[Item] = field(default_factory=list)
    bad: list[BadItem] = field(default_factory=list)
    contents: list[Path | str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    numbered: dict[str, int] = field(default_factory=dict)
    left_out: list[BadItem] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def add(self, item: Item, needs: Needs) -> None:
        """Add an item; an item is bad if its caption or label is missing or cannot be used."""
        if needs and (fault := _fault(item.prompt, needs)):
            self.bad.append(BadItem(item.name, *fault))
        else:
            self.items.append(item)

    def note_unread(self, path: Path) -> None:
        """Note a file that is not an item, if a user may take it for one."""
        if is_unread(path):
            self.left_out.append(BadItem(str(path), "format not read", UNREAD))
        elif path.name.lower().endswith(ARCHIVES):
            reason = "archives among images are not read; unpack it, or set data.source to shards"
            self.left_out.append(BadItem(str(path), "archive", reason))

    @property
    def total(self) -> int:
        """The number of items, good and bad."""
        return len(self.items) + len(self.bad)

    def read_labels(self, classes: int) -> None:
        """Replace the items' prompts by label numbers, for a teacher of `classes` classes.

        Names that are whole numbers are the labels themselves. Other names, in sorted order, are
        numbered from 0. Prints that order, and which classes have no data.

        Raises:
            UserError: a number is not a label of the teacher, or there are more names than classes.
        """
        first_items = {str(item.prompt).strip(): item.name for item in reversed(self.items)}
        folders = self._folder_names()
        names = sorted({*folders, *first_items})
        known = f"the teacher knows {classes} classes, 0 to {classes - 1}"
        if all(_is_number(name) for name in names):
            names.sort(key=float)
            for name in names:
                if not (name.isascii() and name.isdecimal()) or float(name) >= classes:
                    fault = f"its folder {name!r} is no label"
                    if name not in folders:
                        fault = f"{first_items[name]} has label {name!r}"
                    raise UserError(
                        f"{self.where}: {fault}; {known}; number them in that range, or give all "
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
            order = _short_list([f"{label} is {name!r}" for name, label in self.labels.items()])
            print_notice(f"{self.where}: labels are its names in sorted order: {order}")
        self.items = [i._replace(prompt=self.labels[str(i.prompt).strip()]) for i in self.items]
        self._tell_classes({item.prompt for item in self.items}, classes)
        if self.numbered:
            self.labels = self.numbered

    def _folder_names(self) -> set[str]:
        """The names of class folders, without blanks at their ends.

        Raises:
            UserError: a name is only blanks, or two names differ only in blanks.
        """
        names: dict[str, str] = {}
        for folder in self.folders:
            if not (name := folder.strip()):
                raise UserError(f"{self.where}: its folder {folder!r} has no name; rename it")
            if (other := names.setdefault(name, folder)) != folder:
                raise UserError(
                    f"{self.where}: its folders {other!r} and {folder!r} differ only in blanks; "
                    "merge them, or rename one"
                )
        return set(names)

    def _refuse_spellings(self, numbers: list[str], what: str) -> None:
        """Refuse two spellings of one label, such as 1 and 01; the message names both."""
        seen: dict[int, str] = {}
        for name in numbers:
            if (other := seen.setdefault(int(name), name)) != name:
                raise UserError(
                    f"{self.where}: its {what} {other!r} and {name!r} are one number; "
                    "merge them, or renumber one"
                )

    def _tell_classes(self, present: set[int], classes: int) -> None:
        """Print which classes have data, if some have none."""
        if 0 < len(present) < classes:
            print_notice(
                f"{self.where}: of the teacher's {classes} classes, {len(present)} have data: "
                f"{_short_list([str(label) for label in sorted(present)])}"
            )

    def tell_left_out(self) -> None:
        """Print the kinds of files that are left out, with the number and one name of each kind."""
        by_kind: dict[str, list[BadItem]] = {}
        for file in self.left_out:
            by_kind.setdefault(file.kind, []).append(file)
        for kind, files in by_kind.items():
            count, name = len(files), files[0].name
            what = f"{count} files are left out ({kind}), such as" if count > 1 else f"{kind}:"
            print_notice(f"{self.where}: {what} {name}: {files[0].reason}")

    def check(self, bad: Sequence[BadItem], total: int, share: float) -> None:
        """Refuse more than `share` of `total` items to be bad; the message names the first."""
        if len(bad) > share * total:
            first = bad[0]
            raise UserError(
                f"{self.where}: {first.kind}: {first.name}: {first.reason}; {len(bad)} of "
                f"{total:,} items are bad, more than data.skip_share = {share:g} allows; "
                "correct or remove them, or raise data.skip_share"
            )

    def report(
        self, total: int, bad: Sequence[BadItem], first_frames: Sequence[str]
    ) -> dict[str, Any]:
        """What was read and what was left out, for data-report.json.

        Args:
            total: The number of items, good and bad.
            first_frames: Names of items with several frames, of which only the first is read.
        """
        return {
            "items": total,
            "skipped": len(bad),
            "by_kind": dict(Counter(b.kind for b in bad)),
            "files": [b._asdict() for b in bad],
            "left_out": [b._asdict() for b in self.left_out],
            "first_frames": list(first_frames),
            "labels": self.labels,
        }


def _fault(prompt: Any, needs: Needs) -> tuple[str, str] | None:
    """The kind of fault and the reason if a prompt cannot be a caption or a label, else None."""
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        kind = "empty caption" if needs == "caption" else "missing label"
        return kind, f"its {needs} is missing or empty"
    if not isinstance(prompt, str):
        if needs == "label" and isinstance(prompt, int) and not isinstance(prompt, bool):
            return None
        expected = "text" if needs == "caption" else "a whole number or a name"
        shown = ascii(prompt)
        shown = shown if len(shown) <= 40 else f"{shown[:39]}…"
        return (
            f"no {needs}",
            f"its {needs} is {shown}, of type {type(prompt).__name__}; give {expected}",
        )
    if match := CONTROL.search(prompt):
        return "control character", f"its {needs} holds the control character {match[0]!r}"
    if match := SURROGATE.search(prompt):
        return "lone surrogate", f"its {needs} holds {match[0]!a}, which is half a character"
    return None


def _is_number(name: str) -> bool:
    """Whether a name is a decimal number; "nan", "inf" and "1_0" are names."""
    return NUMBER.fullmatch(name) is not None


def _short_list(words: list[str]) -> str:
    """The first SHOWN words, and the number of the others."""
    more = len(words) - SHOWN
    return ", ".join(words[:SHOWN]) + (f" and {more:,} more, in {REPORT}" if more > 0 else "")


def write_report(folder: Path, content: dict[str, Any]) -> None:
    """Write the report into an existing folder, atomically.

    Bytes of a file's name that are not UTF-8 are written as JSON escapes.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write(folder / REPORT, text.encode("utf-8", "backslashreplace").decode())


def check_labels(folder: Path, content: dict[str, Any]) -> None:
    """Refuse to resume a run in which a name had another label; the message gives the name."""
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
                f"{name!r} is {now[name]} now; restore the names in the data"
            )
