"""A small classifier of scenes; its penultimate activations are the features of the metrics."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eval.errors import MetricError
from eval.shapes.scenes import COLOURS, COUNTS, POSITIONS, SHAPES, Scene

WEIGHTS = Path(__file__).parent / "classifier.safetensors"
HEADS = (SHAPES, tuple(COLOURS), COUNTS, tuple(POSITIONS))  # in the order of Scene's fields


class Classifier(nn.Module):
    """A 54k-parameter convolutional classifier of the four attributes of a scene.

    Its 64 penultimate activations are the features of the shapes metrics. Unlike the exact reader
    they also depend on what no caption states: sizes, shades and exact positions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(),
            nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.SiLU(),
            nn.Flatten(), nn.Linear(512, 64), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, sum(map(len, HEADS)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of each attribute, (N, 4), (N, 6), (N, 3), (N, 5), of images in [-1, 1]."""
        return self.head(self.body(images)).split([len(h) for h in HEADS], dim=1)


def labels(scenes: list[Scene]) -> Tensor:
    """Indices (N, 4) of the scenes' attributes in HEADS."""
    return torch.tensor([[h.index(v) for h, v in zip(HEADS, scene)] for scene in scenes])  # pyright: ignore


@cache
def classifier() -> Classifier:
    """The shipped classifier, frozen and in eval mode."""
    net = Classifier()
    net.load_state_dict(load_file(WEIGHTS))
    return net.eval().requires_grad_(False)


@torch.no_grad()
def features(images: Tensor) -> Tensor:
    """Penultimate features (N, 64) of uint8 images (N, 3, 32, 32).

    Raises:
        MetricError: the images have another shape.
    """
    if images.shape[1:] != (3, 32, 32):
        size = "×".join(map(str, images.shape[1:]))
        raise MetricError(f"shapes protocol: images are {size}; it takes 3×32×32")
    body = classifier().body
    return torch.cat([body(part.cpu().float() / 127.5 - 1) for part in images.split(512)])
