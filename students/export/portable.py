"""A pipeline's folder in the form that transformers 4 reads as well as 5.

Version 5 writes CLIP's text encoder and rotary embeddings under other names, of tokenizers one file
where version 4 reads several, and special tokens as a list. Version 4 then gives an encoder random
weights or another base, or stops. What is written here both read alike.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from teachers.storage.files import save_tensors

PREFIX = "text_model."  # of a CLIPTextModel's weights, which version 5 leaves off and reads
BPE = {"vocab.json", "merges.txt"}
SINGLE = {"spiece.model", "tokenizer.model", "vocab.txt"}  # each a whole vocabulary
# Vocabularies as version 4's slow classes read them, and what version 5 no longer writes.
KEPT = BPE | SINGLE | {"added_tokens.json", "special_tokens_map.json"}
PAIRS = ("CLIPTokenizer", "Qwen2Tokenizer")  # whose slow forms read the files of BPE
LISTED, LISTED_IN_4 = "extra_special_tokens", "additional_special_tokens"  # one list, two names


def make_portable(folder: Path, origin: Path | None = None) -> None:
    """Rewrite a pipeline's folder for both versions, in place; files that both read are left.

    Args:
        origin: The folder whose tokenizers these are, for files of theirs that were not written.
    """
    path = folder / "model_index.json"
    index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for part, entry in index.items():
        if not isinstance(entry, list) or entry[0] != "transformers":
            continue
        if (config := folder / part / "config.json").is_file():
            tree = json.loads(config.read_text(encoding="utf-8"))
            if older_rope(tree):
                write(config, tree)
        if entry[1] == "CLIPTextModel":
            prefix_weights(folder / part)
        elif entry[1].endswith(("Tokenizer", "TokenizerFast")):
            name = vocabulary(folder / part, entry[1], origin and origin / part)
            index[part] = ["transformers", name]
    write(path, index)


def older_rope(tree: Any) -> bool:
    """Add rotary embeddings' settings to a config under version 4's names too; whether any were
    added.

    Version 4 does not know `rope_parameters` and takes a base of its own instead.
    """
    if not isinstance(tree, dict):
        return False
    changed = [older_rope(value) for value in tree.values()]
    rope = tree.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and "rope_theta" not in tree:
        tree["rope_theta"] = rope["rope_theta"]
        rest = {k: v for k, v in rope.items() if k != "rope_theta"}
        if rest.keys() - {"rope_type"} or rest.get("rope_type") != "default":
            tree["rope_scaling"] = rest
        return True
    return any(changed)


def prefix_weights(folder: Path) -> None:
    """Give a CLIPTextModel's weights the names that begin with `text_model.`"""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata(), list(file.keys())
            if all(name.startswith(PREFIX) for name in names):
                continue
            tensors = {prefixed(name): file.get_tensor(name) for name in names}
        draft = path.with_name(f".{path.name}.draft")
        save_tensors(tensors, draft, metadata)
        draft.replace(path)
    for path in folder.glob("*.safetensors.index*.json"):
        tree = json.loads(path.read_text(encoding="utf-8"))
        tree["weight_map"] = {prefixed(k): v for k, v in tree["weight_map"].items()}
        write(path, tree)


def prefixed(name: str) -> str:
    """A weight's name with the prefix."""
    return name if name.startswith(PREFIX) else PREFIX + name


def vocabulary(folder: Path, name: str, origin: Path | None) -> str:
    """Complete a tokenizer's folder; the class that both versions read it by.

    Args:
        name: The class that it was saved as.
        origin: The folder of the tokenizer that it was made of, where there is one.
    """
    if origin is not None:
        for file in KEPT:
            if (origin / file).is_file() and not (folder / file).exists():
                shutil.copyfile(origin / file, folder / file)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if isinstance(settings.get(LISTED), list):
        settings[LISTED_IN_4] = settings.pop(LISTED)  # version 5 reads either
        write(config, settings)
    there = {p.name for p in folder.iterdir()}
    if "tokenizer.json" not in there or name.endswith("Fast"):
        return name
    if name in PAIRS and add_pairs(folder):
        return name
    return name if there & SINGLE else f"{name}Fast"  # that reads tokenizer.json in either version


def add_pairs(folder: Path) -> bool:
    """Write vocab.json and merges.txt of tokenizer.json, if its model is of byte pairs and either
    is missing; whether both are there."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE as BytePairs

    if all((folder / file).is_file() for file in BPE):
        return True
    model = Tokenizer.from_file(str(folder / "tokenizer.json")).model
    if not isinstance(model, BytePairs):
        return False
    model.save(str(folder))
    return True


def write(path: Path, tree: dict[str, Any]) -> None:
    """Write JSON, unless that is what the file holds."""
    if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != tree:
        path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
