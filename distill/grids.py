"""Image grids for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from teachers.conditions import Pictured

COLUMNS = 10  # of a run's sample grids
CELL = 40  # pixels: smaller images are enlarged to at least this side
FRAMES = 8  # the most frames of a video that a grid shows
SMALL, LARGE = 64, 192  # pixels: the least and the most side of a picture in a table
MARGIN, LETTERS = 12, 15  # pixels of a table: between its cells, and of its text
GAP = 2  # and between the pictures of a cell


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


def pictures_of(prompts: Sequence[Any]) -> Tensor | None:
    """The pictures (N, 3, H, W) of prompts, grey where they are painted anew; None if they have
    none."""
    if not prompts or not all(isinstance(p, Pictured) for p in prompts):
        return None
    return torch.stack([p.picture if p.mask is None else p.picture * (1 - p.mask) for p in prompts])


def save_samples(images: Tensor, prompts: Sequence[Any], path: Path) -> None:
    """Write a run's samples as a grid, below the pictures that came with their prompts."""
    if (given := pictures_of(prompts)) is None:
        save_grid(images, path, COLUMNS)
    else:
        save_grid(torch.cat([given.to(images), images]), path, len(given))


def save_table(
    cells: Sequence[Sequence[Tensor]], path: Path, rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Write a table of pictures as one PNG, with a name above each column and left of each row.

    Args:
        cells: By row and column, uint8 pictures (N, C, H, W), which are side by side.
    """
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font: Any = ImageFont.load_default(LETTERS)
    strips = [[np.concatenate(_spaced(cell), 1) for cell in line] for line in cells]
    height, width = strips[0][0].shape[:2]
    left = max(int(font.getlength(name)) for name in rows) + 2 * MARGIN
    top = LETTERS + 2 * MARGIN
    size = left + len(columns) * (width + MARGIN), top + len(rows) * (height + MARGIN)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for j, name in enumerate(columns):
        pen.text((left + j * (width + MARGIN), MARGIN), name, "black", font)
    for i, (name, line) in enumerate(zip(rows, strips, strict=True)):
        y = top + i * (height + MARGIN)
        pen.text((MARGIN, y + (height - LETTERS) // 2), name, "black", font)
        for j, strip in enumerate(line):
            page.paste(Image.fromarray(strip), (left + j * (width + MARGIN), y))
    page.save(path, optimize=True)


def _spaced(images: Tensor) -> list[Any]:
    """Pictures (N, C, H, W) as RGB arrays, with white between them."""
    import numpy as np

    arrays = [_fitted(v) for v in images]
    white = np.full((arrays[0].shape[0], GAP, 3), 255, np.uint8)
    return [part for array in arrays for part in (array, white)][:-1]


def _fitted(image: Tensor) -> Any:
    """A picture (C, H, W) as an RGB array of a size that suits a table."""
    import numpy as np
    from PIL import Image

    array = image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
    longest = max(array.shape[:2])
    if longest <= LARGE:
        factor = max(1, -(-SMALL // longest))
        return array.repeat(factor, 0).repeat(factor, 1)
    h, w = (max(1, round(v * LARGE / longest)) for v in array.shape[:2])
    return np.asarray(Image.fromarray(array).resize((w, h), Image.Resampling.LANCZOS))
