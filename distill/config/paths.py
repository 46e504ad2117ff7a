"""Relative paths in a recipe's file: they are relative to the file's folder.

A value that names nothing there stays as it is, so it is a name, or a path relative to the working
folder; values given on the command line always are. A path that is found is written relative to the
working folder where it is below it, and else in full. The recipe in a run's folder holds such
values, and they are not looked for again in that folder: the run notes the folder that they are
relative to, so that commands on a finished run find them from anywhere.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill.files import write
from teachers.storage.plugin import is_function
from teachers.teacher import EMBEDDED

FILE = "teacher.adapters.*.file"  # the key whose values are paths and never names
# Keys whose values may be paths, alone or before a colon; `*` is every item of a list or a
# mapping. Those in CODE are only files of Python.
KEYS = (
    "teacher",
    "teacher.source",
    "teacher.vae",
    "teacher.config",
    "teacher.guidance.weaker",
    "teacher.discriminator.file",
    FILE,
    "data.source",
    "data.source.hf",
    "data.path",
    "data.images",
    "data.images.hf",
    "data.prompts",
    "data.prompts.hf",
    "data.captions",
    "data.targets",
    "data.masks",
    "student.architecture.network",
    "critic.encoder",
    "objective.name",
    "eval.metric",
    "rewards.*.function",
)
CODE = (
    "student.architecture.network",
    "critic.encoder",
    "objective.name",
    "eval.metric",
    "rewards.*.function",
)
RESERVED = (*EMBEDDED, "pairs")  # names that are never paths
NAMES = ("analytic:", "pack:")  # begin values that are no paths
RUN = (".lock", "metrics.jsonl", "checkpoints")  # one of them lies beside the recipe of a run
START = ".started-in.json"  # in a run's folder: the folder that its recipe's paths are relative to
PATTERN = re.compile(r"[*?\[{]")  # in names of several shards


def located(tree: dict[str, Any], file: Path) -> dict[str, Any]:
    """A recipe's tree with the paths that were found beside its file; the tree is changed.

    Args:
        tree: As YAML has it, unchecked: values of a wrong type stay as they are.
        file: The recipe's file.
    """
    folder = file.parent
    if file.name == "recipe.yaml" and any((folder / name).exists() for name in RUN):
        return tree
    for key in KEYS:
        if key == "data.captions" and _reads_images(tree):
            continue  # it names the captions' place in the images' folder
        for node, name in _places(tree, key.split(".")):
            node[name] = beside(node[name], folder, code=key in CODE)
    return tree


def note_start(run: Path) -> None:
    """Write into a run's folder where it was started, in full and as seen from that folder."""
    here, out = Path.cwd(), os.path.abspath(run)
    places = {"folder": str(here), "from_run": os.path.relpath(here, out)}
    write(run / START, json.dumps(places) + "\n")


def from_start(tree: dict[str, Any], run: Path) -> dict[str, Any]:
    """A finished run's recipe with its relative paths looked up where the run was started.

    If the run moved together with that folder, the folder is found by its place beside the run. A
    LoRA file that is in neither place is named in full, so that a message says where it was.

    Args:
        tree: The recipe's keys; the tree is changed.
        run: The run's folder. Without a note of the start the tree stays as it is.
    """
    try:
        places = json.loads((run / START).read_text(encoding="utf-8"))
        moved, folder = run.absolute() / str(places["from_run"]), Path(str(places["folder"]))
    except (OSError, ValueError, KeyError, TypeError):
        return tree
    for key in KEYS:
        if key == "data.captions" and _reads_images(tree):
            continue
        for node, name in _places(tree, key.split(".")):
            value = node[name]
            for place in (moved, folder):
                if (found := beside(value, place, code=key in CODE)) != value:
                    node[name] = found
                    break
            else:
                if key == FILE and _is_relative(value) and not Path(value).exists():
                    node[name] = str(folder / value)
    return tree


def _reads_images(tree: dict[str, Any]) -> bool:
    data = tree.get("data")
    return isinstance(data, dict) and data.get("source") is not None


def _is_relative(value: Any) -> bool:
    return isinstance(value, str) and not value.startswith(("~", "/"))


def beside(value: Any, folder: Path, code: bool = False) -> Any:
    """A value with the path that it names in a folder; unchanged if it names none there.

    Args:
        code: Only "path/to/file.py:NAME" is a path.
    """
    if not isinstance(value, str) or value in RESERVED or value.startswith(NAMES):
        return value
    if code and not is_function(value):
        return value
    before, colon, after = value.rpartition(":")
    candidates = [(before, colon + after)] if code else [(value, ""), (before, colon + after)]
    for path, rest in candidates:
        if path and not path.startswith(("~", "/")) and _exists(folder, path):
            return _shown(folder / path) + rest
    return value


def _exists(folder: Path, path: str) -> bool:
    try:
        if (folder / path).exists():
            return True
        shards = re.sub(r"\{[^}]*\}", "*", path)
        return bool(PATTERN.search(path)) and any(True for _ in folder.glob(shards))
    except (OSError, ValueError, NotImplementedError):  # no path of this system
        return False


def _shown(path: Path) -> str:
    """A path from the working folder if it is below it, else in full."""
    full = os.path.normpath(path.absolute())
    here = os.path.normpath(Path.cwd())
    return os.path.relpath(full, here) if full.startswith(here + os.sep) else full


def _places(node: Any, key: Sequence[str]) -> Iterator[tuple[Any, Any]]:
    """The mappings or lists that hold a key's values, and the values' places in them."""
    name, *rest = key
    places: list[Any]
    if name == "*":
        places = list(range(len(node))) if isinstance(node, list) else []
        places = list(node) if isinstance(node, dict) else places
    else:
        places = [name] if isinstance(node, dict) and name in node else []
    for place in places:
        if rest:
            yield from _places(node[place], rest)
        else:
            yield node, place
