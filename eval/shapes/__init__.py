"""The shapes protocol: captioned pictures drawn by our own code, and an exact reader of them."""

from __future__ import annotations

from eval.shapes.reader import accuracy, read
from eval.shapes.scenes import Scene, all_captions, captions, draw, parse

__all__ = ["Scene", "accuracy", "all_captions", "captions", "draw", "parse", "read"]
