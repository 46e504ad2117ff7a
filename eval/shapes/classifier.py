"""Two small classifiers of scenes; their penultimate activations are the features of the metrics.

They differ in seed and architecture: what is trained against one can be measured by the other.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eval.errors import MetricError
from eval.shapes.scenes import COLOURS, COUNTS, POSITIONS, SHAPES, Scene

HERE = Path(__file__).parent
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


class PatchClassifier(nn.Module):
    """A 50k-parameter classifier of the same attributes that mixes patches of 4×4 pixels.

    Its 48 penultimate activations are the second features of the shapes metrics.
    """

    def __init__(self, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        mixers = [
            layer
            for _ in range(depth)
            for layer in (
                nn.Conv2d(width, width, 5, padding=2, groups=width), nn.GELU(),
                nn.Conv2d(width, width, 1), nn.GELU(), nn.GroupNorm(4, width),
            )
        ]  # fmt: skip
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=4), nn.GELU(), *mixers,
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, 48), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(48, sum(map(len, HEADS)))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits of each attribute, as `Classifier`'s."""
        return self.head(self.body(images)).split([len(h) for h in HEADS], dim=1)


CLASSIFIERS = {"classifier": Classifier, "patches": PatchClassifier}  # by their files' names


def labels(scenes: list[Scene]) -> Tensor:
    """Indices (N, 4) of the scenes' attributes in HEADS."""
    return torch.tensor([[h.index(v) for h, v in zip(HEADS, scene)] for scene in scenes])  # pyright: ignore


@cache
def classifier(name: str = "classifier") -> Classifier | PatchClassifier:
    """A shipped classifier, frozen and in eval mode."""
    net = CLASSIFIERS[name]()
    net.load_state_dict(load_file(HERE / f"{name}.safetensors"))
    return net.eval().requires_grad_(False)


def features(images: Tensor) -> Tensor:
    """Penultimate features (N, 64) of uint8 images (N, 3, 32, 32).

    Raises:
        MetricError: the images have another shape.
    """
    return _features("classifier", images)


def patch_features(images: Tensor) -> Tensor:
    """The second classifier's penultimate features (N, 48) of uint8 images (N, 3, 32, 32).

    Raises:
        MetricError: the images have another shape.
    """
    return _features("patches", images)


@torch.no_grad()
def _features(name: str, images: Tensor) -> Tensor:
    if images.shape[1:] != (3, 32, 32):
        size = "×".join(map(str, images.shape[1:]))
        raise MetricError(f"shapes protocol: images are {size}; it takes 3×32×32")
    body = classifier(name).body
    return torch.cat([body(part.cpu().float() / 127.5 - 1) for part in images.split(512)])
