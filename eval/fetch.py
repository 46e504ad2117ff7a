"""What a metric needs from elsewhere: weights, never unpickled, and packages.

Whatever is not to be had ends in one line that says where to put it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor

from eval.errors import MetricError


def cache() -> Path:
    """Where weights and reference statistics are kept: $FEWSTEP_CACHE, or ~/.cache/fewstep."""
    return Path(os.environ.get("FEWSTEP_CACHE", Path.home() / ".cache" / "fewstep"))


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def download(url: str, digest: str) -> Path:
    """The file at `url`, from the cache where it is there.

    Raises:
        MetricError: it cannot be had, or its SHA-256 is not `digest`.
    """
    path = cache() / "weights" / url.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), digest, progress=False)
        except (URLError, OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise MetricError(
                f"weights {path.name}: not to be had from {url} ({_line(error)}); "
                f"put the file at {path}"
            ) from error
    if sha256(path) != digest:
        raise MetricError(f"weights {path}: not the published file (SHA-256); delete it")
    return path


def state(url: str) -> dict[str, Tensor]:
    """The state dict at `url`, whose file name ends in eight digits of its SHA-256.

    Raises:
        MetricError: it cannot be had, or is another file.
    """
    folder = cache() / "weights"
    try:
        return torch.hub.load_state_dict_from_url(
            url, str(folder), "cpu", progress=False, check_hash=True, weights_only=True
        )
    except (URLError, OSError, RuntimeError, UnpicklingError) as error:
        name = url.rpartition("/")[2]
        raise MetricError(
            f"weights {name}: not to be had from {url} ({_line(error)}); "
            f"put the file at {folder / name}"
        ) from error


WORDS = ("*.json", "*.txt")  # configs and tokenizers


def snapshot(repo: str, revision: str, patterns: Sequence[str]) -> Path:
    """The files of a Hub repository at a revision that fit the patterns, in their folder.

    Raises:
        MetricError: they are neither in the Hub's cache nor to be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MetricError(
            f"weights {repo}: not to be had from the Hub ({_line(error)}); download them where "
            f"there is a network: hf download {repo} --revision {revision}"
        ) from error


def pretrained(kind: str, source: str, revision: str) -> Any:
    """A model of transformers' class `kind`, from a folder here or else from the Hub, in eval mode.

    From safetensors; older repositories hold a state dict, which is read with weights_only.

    Raises:
        MetricError: it is not to be had, or lacks weights, which transformers would make up.
    """
    stock = package("transformers", "transformers")
    folder = Path(source)
    if not folder.is_dir():
        folder = snapshot(source, revision, [*WORDS, "model.safetensors"])
        if not (folder / "model.safetensors").exists():
            folder = snapshot(source, revision, [*WORDS, "pytorch_model.bin"])
    try:
        model, report = getattr(stock, kind).from_pretrained(
            folder, weights_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise MetricError(f"weights {source}: no {kind} in {folder} ({_line(error)})") from error
    if lacking := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise MetricError(f"weights {source}: {kind} lacks {len(lacking)} of its weights there")
    return model.eval()


def tokenizer(source: str, revision: str) -> Any:
    """A tokenizer, from a folder here or else from the Hub.

    Raises:
        MetricError: it is not to be had.
    """
    stock = package("transformers", "transformers")
    folder = Path(source) if Path(source).is_dir() else snapshot(source, revision, WORDS)
    try:
        return stock.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise MetricError(f"tokenizer {source}: none in {folder} ({_line(error)})") from error


def package(module: str, pip: str) -> Any:
    """A module that only one metric needs.

    Raises:
        MetricError: it, or something that it needs itself, is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MetricError(
            f"{pip}: its package cannot be imported ({error}); pip install {pip}"
        ) from error


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0].strip() or type(error).__name__
