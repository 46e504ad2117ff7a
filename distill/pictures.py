"""Grids of pictures, large enough to look at."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torchvision.utils import save_image

COLUMNS = 10  # of a run's sample grids
CELL = 40  # pixels that a small picture is enlarged to, at least


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images (N, C, H, W) in [-1, 1] as one picture, `columns` to a row.

    Images smaller than a thumbnail are enlarged by a whole factor, each pixel a square.
    """
    factor = max(1, -(-CELL // max(images.shape[-2:])))
    images = nn.functional.interpolate(images.float(), scale_factor=factor)
    save_image(images, path, nrow=columns, normalize=True, value_range=(-1, 1), padding=factor)
