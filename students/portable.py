"""An exported pipeline's text parts, written so that transformers 4 reads them as 5 does.

Version 5 keeps a tokenizer in tokenizer.json alone, and a CLIP text model's weights without the
prefix `text_model.`. Version 4 builds diffusers' tokenizers from their vocabulary's own files, and
would fill the weights that it does not find with random ones. Version 5 reads both forms.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from teachers.errors import UserError
from teachers.files import save_tensors
from teachers.teacher import EMBEDDED, find, read_json

PREFIX = "text_model."
BPE = {"vocab.json", "merges.txt"}
CONFIG = "tokenizer_config.json"
LISTED, LISTED_IN_4 = "extra_special_tokens", "additional_special_tokens"  # one list, two names


def complete(folder: Path, pipe: Any, source: str) -> None:
    """Add to a saved pipeline what older versions of transformers look for.

    Args:
        folder: Where `pipe.save_pretrained` has written.
        source: The teacher's, whose vocabularies are copied where a tokenizer cannot write them.
    """
    origin = None
    for name, part in pipe.components.items():
        if (folder / name).is_dir() and hasattr(part, "vocab_files_names"):
            origin = origin or folder_of(source)
            add_vocabulary(part, folder / name, origin / name)
        elif type(part).__name__ == "CLIPTextModel":
            add_prefix(folder / name)


def folder_of(source: str) -> Path:
    """A teacher's folder; one that does not exist for a teacher that has none."""
    try:
        return EMBEDDED.get(source) or find(source)
    except UserError:  # of a user's own function
        return Path("nowhere") / "at all"


def add_vocabulary(tokenizer: Any, folder: Path, origin: Path) -> None:
    """Write the files of a tokenizer's vocabulary that are not in its folder."""
    wanted = set(tokenizer.vocab_files_names.values())
    for file in [f for f in wanted if not (folder / f).exists() and (origin / f).is_file()]:
        shutil.copyfile(origin / file, folder / file)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    lacks = [f for f in BPE if not (folder / f).exists()]
    if wanted >= BPE and lacks and backend is not None:
        backend.model.save(str(folder))  # tokenizers' own: vocab.json and merges.txt
    config = read_json(folder / CONFIG, str(folder)) if (folder / CONFIG).is_file() else {}
    if isinstance(config.get(LISTED), list):
        config[LISTED_IN_4] = config.pop(LISTED)  # version 5 reads either
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def add_prefix(folder: Path) -> None:
    """Give the weights of a saved CLIPTextModel the names that every version knows."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata(), list(file.keys())
            if all(name.startswith(PREFIX) for name in names):
                continue
            tensors = {full(name): file.get_tensor(name) for name in names}
        draft = path.with_name(f".{path.name}.draft")
        save_tensors(tensors, draft, metadata)
        draft.replace(path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        tree = json.loads(index.read_text())
        tree["weight_map"] = {full(k): v for k, v in tree["weight_map"].items()}
        index.write_text(json.dumps(tree, indent=2) + "\n")


def full(name: str) -> str:
    """A weight's name with the prefix."""
    return name if name.startswith(PREFIX) else PREFIX + name
