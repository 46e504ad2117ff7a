"""Image grids for people to look at."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

COLUMNS = 10  # of a run's sample grids
CELL = 40  # pixels: smaller images are enlarged to at least this side
FRAMES = 8  # the most frames of a video that a grid shows


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images (N, C, H, W) in [-1, 1] as one PNG, `columns` to a row.

    Small images are enlarged by a whole factor, so that each pixel becomes a square. Of videos
    (N, C, F, H, W), each fills a row with frames at equal intervals.
    """
    from torchvision.utils import save_image  # takes seconds to import

    if images.ndim == 5:
        columns = min(FRAMES, images.shape[2])
        frames = torch.linspace(0, images.shape[2] - 1, columns).round().long()
        images = images[:, :, frames].movedim(2, 1).flatten(0, 1)
    factor = max(1, -(-CELL // max(images.shape[-2:])))
    images = nn.functional.interpolate(images.float(), scale_factor=factor)
    save_image(images, path, nrow=columns, normalize=True, value_range=(-1, 1), padding=factor)
