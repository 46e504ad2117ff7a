"""Recipe keys that used to have another name: the old one is still read, with one warning line."""

from __future__ import annotations

from typing import Any

from distill.console import print_notice
from teachers.errors import UserError

DMD2 = {
    "realism": "gan_weight",
    "critique": "critic_weight",
    "reuse": "share_samples",
    "rivals_see": "fake_sees",
}
# By objective.name: the keys of `objective`, old to new.
OBJECTIVES = {
    "dmd2": DMD2,
    "fdistill": {**DMD2, "memory": "ratio_ema"},
    "sid": {"rivals_see": "fake_sees"},
    "progressive": {"first": "initial_steps"},
}
# By section: its keys, old to new, whatever the objective is.
SECTIONS = {
    "train.vae": {"moves": "optimizer"},
    "train.unet": {"moves": "optimizer"},
}
_warned: set[str] = set()  # one line for each key, however many rows of a benchmark have it


def current_names(
    tree: dict[str, Any], objective: str | None = None, quiet: bool = False
) -> dict[str, Any]:
    """A recipe's tree, or a part of one to lay over it, with every old key under its new name.

    Args:
        tree: As it was read; it is not changed.
        objective: The name of its objective, where the tree does not say.
        quiet: No warning, for files that the user did not write.

    Raises:
        UserError: a key is given under both names.
    """
    for section, names in _renamed(tree, objective).items():
        tree = _section_renamed(tree, section.split("."), section, names, quiet)
    return tree


def current_key(key: str, tree: dict[str, Any]) -> str:
    """The new name of a dotted key, such as an override's of `tree`."""
    for section, names in _renamed(tree, None).items():
        prefix = f"{section}."
        leaf, dot, rest = key.removeprefix(prefix).partition(".")
        if key.startswith(prefix) and leaf in names:
            _warn(section, leaf, names[leaf])
            return f"{prefix}{names[leaf]}{dot}{rest}"
    return key


def _renamed(tree: dict[str, Any], objective: str | None) -> dict[str, dict[str, str]]:
    """The sections of a tree that had other keys, old to new."""
    section = tree.get("objective")
    named = section.get("name") if isinstance(section, dict) else None
    name = named if isinstance(named, str) else objective
    return {**SECTIONS, "objective": OBJECTIVES.get(name or "", {})}


def _section_renamed(
    tree: dict[str, Any], path: list[str], section: str, names: dict[str, str], quiet: bool
) -> dict[str, Any]:
    """The tree, of which the section at `path` has its new names; the order of keys is kept."""
    if path:
        below = tree.get(path[0])
        if not isinstance(below, dict):
            return tree
        return {**tree, path[0]: _section_renamed(below, path[1:], section, names, quiet)}
    for old in [k for k in names if k in tree]:
        if names[old] in tree:
            raise UserError(
                f"{section}.{old}: it is the old name of {names[old]}, which is given too; "
                "remove one of the two"
            )
        if not quiet:
            _warn(section, old, names[old])
    return {names.get(k, k): v for k, v in tree.items()}


def _warn(section: str, old: str, new: str) -> None:
    if (key := f"{section}.{old}") not in _warned:
        _warned.add(key)
        print_notice(f"{key} is now {section}.{new}; the old name will go with the next release")
