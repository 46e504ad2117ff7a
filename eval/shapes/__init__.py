"""The embedded shapes: captioned images drawn by code, and an exact reader of them."""

from __future__ import annotations

from eval.shapes.classifier import features, patch_features
from eval.shapes.reader import accuracy, known_words_accuracy, read
from eval.shapes.scenes import (
    COLOURS,
    COUNTS,
    POSITIONS,
    SHAPES,
    Scene,
    all_captions,
    captions,
    draw,
    parse,
)

__all__ = [
    "COLOURS",
    "COUNTS",
    "POSITIONS",
    "SHAPES",
    "Scene",
    "accuracy",
    "all_captions",
    "captions",
    "draw",
    "features",
    "known_words_accuracy",
    "parse",
    "patch_features",
    "read",
]
