"""What a codec is, as a hash: of its networks' weights and configurations, and its tokenizers.

A cache of what it encoded is good for as long as this stays the same. The teacher's denoiser has
no part in it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from teachers.teacher import Teacher

DEPTH = 4  # how far below the codec networks are looked for: codec.pipe.text_encoder is 2
PLAIN = (str, int, float, bool, type(None))


def networks(teacher: Teacher) -> list[nn.Module]:
    """The codec's networks: all that can be reached from it, but for the denoiser."""
    return [v for _, v in _reached(teacher) if isinstance(v, nn.Module)]


def fingerprint(teacher: Teacher) -> str:
    """A hash that changes when the codec would encode differently."""
    digest = hashlib.blake2b(digest_size=16)
    for path, value in sorted(_reached(teacher), key=lambda pair: pair[0]):
        digest.update(f"{path}={type(value).__name__}:".encode())
        if isinstance(value, nn.Module):
            _weights(digest, value)
        elif isinstance(value, Tensor):
            _tensor(digest, value)
        elif isinstance(value, PLAIN):
            digest.update(repr(value).encode())
        else:
            digest.update(_vocabulary(value))
    return digest.hexdigest()


def _reached(teacher: Teacher) -> Iterator[tuple[str, Any]]:
    """Path and value of every network, tensor, tokenizer and plain setting of the codec.

    Plain settings and tensors count near the codec and under public names only: what lies deeper,
    or is private, changes as it is used.
    """
    seen = {id(m) for m in teacher.denoiser.modules()}
    todo: list[tuple[str, Any, int]] = [(type(teacher.codec).__name__, teacher.codec, 0)]
    while todo:
        path, value, depth = todo.pop()
        if id(value) in seen and not isinstance(value, PLAIN):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module) or _is_tokenizer(value):
            yield path, value
            if depth == 0:  # a codec that is a network itself has its settings too
                own = {k: v for k, v in vars(value).items() if k != "training"}
                todo += [(f"{path}.{k}", v, 1) for k, v in own.items() if isinstance(v, PLAIN)]
        elif isinstance(value, (Tensor, *PLAIN)):
            if depth <= 2 and not any(p.startswith("_") for p in path.split(".")):
                yield path, value
        elif isinstance(value, dict):
            todo += [(f"{path}.{k}", v, depth + 1) for k, v in value.items() if depth < DEPTH]
        elif isinstance(value, list | tuple):
            todo += [(f"{path}.{i}", v, depth + 1) for i, v in enumerate(value) if depth < DEPTH]
        elif isinstance(value, type):
            yield path, value.__qualname__
        elif depth < DEPTH and isinstance(inner := getattr(value, "__dict__", None), dict):
            todo += [(f"{path}.{k}", v, depth + 1) for k, v in inner.items()]


def _is_tokenizer(value: Any) -> bool:
    transformers = sys.modules.get("transformers.tokenization_utils_base")
    return transformers is not None and isinstance(value, transformers.PreTrainedTokenizerBase)


def _vocabulary(tokenizer: Any) -> bytes:
    vocabulary = sorted(tokenizer.get_vocab().items())
    return json.dumps([vocabulary, tokenizer.model_max_length]).encode()


def _weights(digest: Any, module: nn.Module) -> None:
    """Its structure as it prints, its configuration where it is a pretrained one, its tensors."""
    digest.update(repr(module).encode())
    config = getattr(module, "config", None)
    if config is not None:
        tree = config if isinstance(config, dict) else config.to_dict()
        kept = {str(k): v for k, v in tree.items() if not str(k).startswith("_")}
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):  # some quantisers keep plain settings among them
            _tensor(digest, value)


def _tensor(digest: Any, value: Tensor) -> None:
    digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(flat.numpy())
