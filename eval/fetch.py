"""Weights, which are never unpickled, and packages that metrics need.

The error for a missing file is one line that says where to put it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar
from urllib.error import URLError

import torch
from torch import Tensor, nn

from eval.errors import MetricError

Model = TypeVar("Model", bound=nn.Module)


def cache() -> Path:
    """The folder of weights and reference statistics: $FEWSTEP_CACHE, or ~/.cache/fewstep."""
    return Path(os.environ.get("FEWSTEP_CACHE", Path.home() / ".cache" / "fewstep"))


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def download(url: str, digest: str) -> Path:
    """The file at `url`, from the cache if it is there.

    Raises:
        MetricError: it cannot be downloaded, or its SHA-256 is not `digest`.
    """
    path = cache() / "weights" / url.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), digest, progress=False)
        except (URLError, OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise MetricError(
                f"weights {path.name}: cannot be downloaded from {url} ({_line(error)}); "
                f"put the file at {path}"
            ) from error
    if sha256(path) != digest:
        raise MetricError(f"weights {path}: its SHA-256 is not the published file's; delete it")
    return path


def state_dict(url: str) -> dict[str, Tensor]:
    """The state dict at `url`, whose file name ends in eight digits of its SHA-256.

    Raises:
        MetricError: it cannot be downloaded, or is another file.
    """
    folder = cache() / "weights"
    try:
        return torch.hub.load_state_dict_from_url(
            url, str(folder), "cpu", progress=False, check_hash=True, weights_only=True
        )
    except (URLError, OSError, RuntimeError, UnpicklingError) as error:
        name = url.rpartition("/")[2]
        raise MetricError(
            f"weights {name}: cannot be downloaded from {url} ({_line(error)}); "
            f"put the file at {folder / name}"
        ) from error


TEXT_FILES = ("*.json", "*.txt")  # configs and tokenizers


def snapshot(repo: str, revision: str, patterns: Sequence[str]) -> Path:
    """The folder of a Hub repository's files, at a revision, that match the patterns.

    Raises:
        MetricError: they are not in the Hub's cache and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MetricError(
            f"weights {repo}: cannot be downloaded from the Hub ({_line(error)}); where there is a "
            f"network, run: hf download {repo} --revision {revision}"
        ) from error


def pretrained(kind: str, source: str, revision: str) -> Any:
    """A frozen model of transformers' class `kind` in eval mode, from a folder or else the Hub.

    The weights are safetensors, or an older repository's state dict, read with weights_only.

    Raises:
        MetricError: it is missing, or it lacks weights that transformers would initialise randomly.
    """
    stock = package("transformers", "transformers")
    folder = Path(source)
    if not folder.is_dir():
        folder = snapshot(source, revision, [*TEXT_FILES, "model.safetensors"])
        if not (folder / "model.safetensors").exists():
            folder = snapshot(source, revision, [*TEXT_FILES, "pytorch_model.bin"])
    try:
        model, report = getattr(stock, kind).from_pretrained(
            folder, weights_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise MetricError(
            f"weights {source}: {folder} holds no {kind} ({_line(error)}); download it again"
        ) from error
    if lacking := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise MetricError(
            f"weights {source}: {kind} lacks {len(lacking)} of its weights; download it again"
        )
    return model.eval().requires_grad_(False)


def checkpoint(source: str, revision: str, name: str) -> dict[str, Any]:
    """A file of `torch.save` in a local folder or else on the Hub, read with weights_only.

    Raises:
        MetricError: it is missing, or holds something else than tensors and plain data.
    """
    folder = Path(source) if Path(source).is_dir() else snapshot(source, revision, [name])
    try:
        return torch.load(folder / name, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise MetricError(
            f"weights {source}: {name} cannot be read ({_line(error)}); download it again"
        ) from error


def configs(source: str, revision: str) -> Path:
    """The folder of a repository's configs and tokenizer: a local one, or else from the Hub."""
    return Path(source) if Path(source).is_dir() else snapshot(source, revision, TEXT_FILES)


def filled(model: Model, state: dict[str, Tensor], source: str) -> Model:
    """A model with these weights, frozen and in eval mode.

    Args:
        source: Where they are from, for messages.

    Raises:
        MetricError: it has weights that they lack, or of another shape.
    """
    try:
        lacking = model.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:  # another shape
        raise MetricError(
            f"weights {source}: not those of {type(model).__name__} ({_line(error)}); download "
            "them again"
        ) from error
    if lacking:
        raise MetricError(
            f"weights {source}: {type(model).__name__} lacks {len(lacking)} of its weights, such "
            f"as {lacking[0]}; download them again"
        )
    return model.eval().requires_grad_(False)


def tokenizer(source: str, revision: str) -> Any:
    """A tokenizer, from a local folder or else from the Hub.

    Raises:
        MetricError: it is missing.
    """
    stock = package("transformers", "transformers")
    folder = configs(source, revision)
    try:
        return stock.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise MetricError(
            f"tokenizer {source}: {folder} holds none ({_line(error)}); download it again"
        ) from error


def package(module: str, pip: str) -> Any:
    """A module that only one metric needs.

    Raises:
        MetricError: it, or one of its own dependencies, is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MetricError(
            f"{pip}: its package cannot be imported ({error}); run pip install {pip}"
        ) from error


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip() or type(error).__name__
