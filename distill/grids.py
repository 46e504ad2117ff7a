"""Grids of pictures, large enough to look at."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

COLUMNS = 10  # of a run's sample grids
CELL = 40  # pixels that a small picture is enlarged to, at least
FRAMES = 8  # of a video that are shown, at most


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images (N, C, H, W) in [-1, 1] as one picture, `columns` to a row.

    Images smaller than a thumbnail are enlarged by a whole factor, each pixel a square. Of videos
    (N, C, F, H, W) each takes a row, of frames evenly apart.
    """
    from torchvision.utils import save_image  # takes seconds to import

    if images.ndim == 5:
        columns = min(FRAMES, images.shape[2])
        at = torch.linspace(0, images.shape[2] - 1, columns).round().long()
        images = images[:, :, at].movedim(2, 1).flatten(0, 1)
    factor = max(1, -(-CELL // max(images.shape[-2:])))
    images = nn.functional.interpolate(images.float(), scale_factor=factor)
    save_image(images, path, nrow=columns, normalize=True, value_range=(-1, 1), padding=factor)
