"""A codec's fingerprint: a hash of its networks' weights and configurations, and its tokenizers.

A cache of what it encoded is valid as long as the fingerprint stays the same. The teacher's
denoiser has no part in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from teachers.teacher import PLAIN, Codec, Teacher, parts_of


def networks(teacher: Teacher) -> list[nn.Module]:
    """The codec's networks, without those of the denoiser."""
    return [v for _, v in _parts(teacher) if isinstance(v, nn.Module)]


def fingerprint(teacher: Teacher) -> str:
    """A hash that changes when the codec would encode differently."""
    digest = hashlib.blake2b(digest_size=16)
    for path, value in sorted(_parts(teacher), key=lambda pair: pair[0]):
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


def of_tensors(tensors: Iterable[Tensor]) -> str:
    """A hash of their types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for value in tensors:
        _tensor(digest, value)
    return digest.hexdigest()


def _parts(teacher: Teacher) -> Iterator[tuple[str, Any]]:
    """Path and value of every part of the codec that is no part of the denoiser."""
    codec: Any = teacher.codec
    denoiser = {id(m) for m in teacher.denoiser.modules()}
    parts = codec.parts() if isinstance(codec, Codec) else dict(parts_of(codec))
    for name, value in parts.items():
        if id(value) not in denoiser:
            yield ".".join(filter(None, (type(codec).__name__, name))), value


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
