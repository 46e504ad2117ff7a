"""The embedded digits: scikit-learn's 1,797 real 8×8 digits, and two small classifiers of them.

The classifiers differ in seed and architecture: what is trained against the features of one can
still be measured by those of the other.

Data: UCI "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak, CC BY 4.0), the part that
scikit-learn ships as `load_digits`, stored here as values 0 to 16.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eval.errors import MetricError

HERE = Path(__file__).parent


@cache
def data() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [-1, 1] and labels (1797,) int64."""
    tensors = load_file(HERE / "data.safetensors")
    return tensors["images"].float()[:, None] / 8 - 1, tensors["labels"].long()


def held_out(n: int) -> Tensor:
    """A mask (n,) of the images that the classifier was not trained on: every fifth."""
    return torch.arange(n) % 5 == 0


class Classifier(nn.Module):
    """A 60k-parameter convolutional classifier of digits.

    Its 64 penultimate activations are the features of the digits metrics.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(256, 64), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8) in [-1, 1]."""
        return self.head(self.body(images))


class DenseClassifier(nn.Module):
    """A 33k-parameter classifier of digits without convolutions.

    Its 48 penultimate activations are the second features of the digits metrics.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.GELU(),
            nn.Linear(128, 128), nn.LayerNorm(128), nn.GELU(),
            nn.Dropout(0.3), nn.Linear(128, 48), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8) in [-1, 1]."""
        return self.head(self.body(images))


CLASSIFIERS = {"classifier": Classifier, "dense": DenseClassifier}  # by the names of their files


@cache
def classifier(name: str = "classifier") -> Classifier | DenseClassifier:
    """A shipped classifier, frozen and in eval mode."""
    net = CLASSIFIERS[name]()
    net.load_state_dict(load_file(HERE / f"{name}.safetensors"))
    return net.eval().requires_grad_(False)


def features(images: Tensor) -> Tensor:
    """Penultimate features (N, 64) of uint8 digits (N, 1, 8, 8).

    Raises:
        MetricError: the images have another shape.
    """
    return _features("classifier", images)


def dense_features(images: Tensor) -> Tensor:
    """The second classifier's penultimate features (N, 48) of uint8 digits (N, 1, 8, 8).

    Raises:
        MetricError: the images have another shape.
    """
    return _features("dense", images)


@torch.no_grad()
def _features(name: str, images: Tensor) -> Tensor:
    if images.shape[1:] != (1, 8, 8):
        raise MetricError(
            f"digits protocol: images are {tuple(images.shape[1:])}; it takes 1×8×8 digits"
        )
    return classifier(name).body(images.float().cpu() / 127.5 - 1)
