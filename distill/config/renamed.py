"""Renamed keys of recipes: the old name is still read, with one line of warning."""

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
# For each objective.name: old and new keys of `objective`.
OBJECTIVES = {
    "dmd2": DMD2,
    "fdistill": {**DMD2, "memory": "ratio_ema"},
    "sid": {"rivals_see": "fake_sees"},
    "progressive": {"first": "initial_steps"},
}
# For each section: its old and new keys, with any objective.
SECTIONS = {
    "student": {"source": "init"},
    "train.vae": {"moves": "optimizer"},
    "train.unet": {"moves": "optimizer"},
}
_warned: set[str] = set()  # one line for each key, even if many rows of a benchmark have it


def current_names(
    tree: dict[str, Any], objective: str | None = None, quiet: bool = False
) -> dict[str, Any]:
    """A recipe's tree, or a part of one, with every old key under its new name.

    Args:
        tree: The tree as read; it is not changed.
        objective: The objective's name, if the tree does not have it.
        quiet: Print no warning, for files that the user did not write.

    Raises:
        UserError: a key is given under both names.
    """
    for section, names in _renamed(tree, objective).items():
        tree = _section_renamed(tree, section.split("."), section, names, quiet)
    return tree


def current_key(key: str, tree: dict[str, Any]) -> str:
    """The new name of a dotted key of `tree`, such as the key of an override."""
    for section, names in _renamed(tree, None).items():
        prefix = f"{section}."
        leaf, dot, rest = key.removeprefix(prefix).partition(".")
        if key.startswith(prefix) and leaf in names:
            _warn(section, leaf, names[leaf])
            return f"{prefix}{names[leaf]}{dot}{rest}"
    return key


def _renamed(tree: dict[str, Any], objective: str | None) -> dict[str, dict[str, str]]:
    """For each section with renamed keys: its old and new keys."""
    section = tree.get("objective")
    name = section.get("name") if isinstance(section, dict) else None
    if not isinstance(name, str):
        name = objective
    return {**SECTIONS, "objective": OBJECTIVES.get(name or "", {})}


def _section_renamed(
    tree: dict[str, Any], path: list[str], section: str, names: dict[str, str], quiet: bool
) -> dict[str, Any]:
    """The tree with the new names in the section at `path`, in the same order."""
    if path:
        below = tree.get(path[0])
        if not isinstance(below, dict):
            return tree
        return {**tree, path[0]: _section_renamed(below, path[1:], section, names, quiet)}
    for old in [k for k in names if k in tree]:
        if names[old] in tree:
            raise UserError(
                f"{section}.{old}: it is the old name of {names[old]}, which is set too; "
                "remove one of the two"
            )
        if not quiet:
            _warn(section, old, names[old])
    return {names.get(k, k): v for k, v in tree.items()}


def _warn(section: str, old: str, new: str) -> None:
    if (key := f"{section}.{old}") not in _warned:
        _warned.add(key)
        print_notice(f"{key} is now {section}.{new}; the old name will go with the next release")
