"""Seeds: every random draw depends on (seed, step, shard), and not on earlier draws."""

from __future__ import annotations

import hashlib
import random

import torch


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from the parts alone, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(*parts: int | str) -> None:
    """Seed torch (all devices) and Python's random from the parts."""
    seed = seed_of(*parts)
    random.seed(seed)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the other way keeps the stack's text for each absent device: milliseconds a step
        torch.default_generator.manual_seed(seed)
