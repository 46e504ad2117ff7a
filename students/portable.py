"""An exported folder in the form that transformers 4 reads as well as 5.

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
from safetensors.torch import load_file, save_file

PREFIX = "text_model."  # of a CLIPTextModel's weights, which version 5 leaves off and reads
# Vocabularies as version 4's slow classes read them, and what version 5 no longer writes.
KEPT = ("vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "added_tokens.json",
        "special_tokens_map.json")  # fmt: skip
PAIRS = ("CLIPTokenizer", "Qwen2Tokenizer")  # whose slow forms read vocab.json and merges.txt


def make_portable(folder: Path, origin: Path | None = None) -> None:
    """Rewrite a pipeline's folder for both versions, in place.

    Args:
        origin: The folder whose tokenizers these are, for files of theirs that were not written.
    """
    path = folder / "model_index.json"
    index: dict[str, Any] = json.loads(path.read_text())
    for part, entry in index.items():
        if not isinstance(entry, list) or entry[0] != "transformers":
            continue
        if (config := folder / part / "config.json").is_file():
            tree = json.loads(config.read_text())
            if older_rope(tree):
                config.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n")
        if entry[1] == "CLIPTextModel":
            prefix_weights(folder / part)
        elif entry[1].endswith(("Tokenizer", "TokenizerFast")):
            index[part] = [
                "transformers",
                vocabulary(folder / part, entry[1], origin and origin / part),
            ]
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


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
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            about = opened.metadata()
        weights = load_file(file)
        if not any(k.startswith(PREFIX) for k in weights):
            save_file({PREFIX + k: v for k, v in weights.items()}, file, metadata=about)
    for file in folder.glob("*.safetensors.index*.json"):
        tree = json.loads(file.read_text())
        names = tree["weight_map"]
        if not any(k.startswith(PREFIX) for k in names):
            tree["weight_map"] = {PREFIX + k: v for k, v in names.items()}
            file.write_text(json.dumps(tree, indent=2) + "\n")


def vocabulary(folder: Path, name: str, origin: Path | None) -> str:
    """Complete a tokenizer's folder; the class that both versions read it by.

    Args:
        name: The class that it was saved as.
    """
    for word in KEPT if origin is not None and origin.is_dir() else ():
        if (origin / word).is_file() and not (folder / word).exists():
            shutil.copyfile(origin / word, folder / word)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    if isinstance(special := settings.get("extra_special_tokens"), list):
        del settings["extra_special_tokens"]
        if special:
            settings["additional_special_tokens"] = special
        config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    there = {p.name for p in folder.iterdir()}
    if "tokenizer.json" not in there or name.endswith("Fast"):
        return name
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    if name in PAIRS and model["type"] == "BPE":
        if not {"vocab.json", "merges.txt"} <= there:
            write_pairs(folder, model)
        return name
    slow = any(word.endswith(".model") for word in there)
    return name if slow else f"{name}Fast"  # that reads tokenizer.json in either version


def write_pairs(folder: Path, model: dict[str, Any]) -> None:
    """vocab.json and merges.txt of a byte-pair model, as tokenizer.json holds it."""
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
