"""The grid of concepts and styles: its pictures, and draws with small changes of place and size."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from eval.emoji.concepts import Concept, caption

SIZE = 64  # pixels of a draw
SCALE = (0.88, 1.0)  # of the picture's side to the draw's side
ANGLE = 4.0  # degrees, the largest turn


@dataclass(frozen=True)
class Grid:
    """The set: one picture in each cell (concept, style) that is not empty.

    Args:
        pictures: uint8 (N, 3, S, S), on white.
        concept: The index of each picture's concept, (N,).
        style: The index of each picture's style, (N,).
        held_out: True for cells that no model may be trained on, (N,).
        mirrors: Whether each picture may be mirrored, (N,).
    """

    styles: list[str]
    concepts: list[Concept]
    pictures: Tensor
    concept: Tensor
    style: Tensor
    held_out: Tensor
    mirrors: Tensor

    def caption(self, index: int) -> str:
        """The caption of a picture."""
        return caption(self.styles[self.style[index]], self.concepts[self.concept[index]].label)

    def to(self, device: torch.device | str) -> Grid:
        """The grid with its tensors on a device."""
        tensors = (self.pictures, self.concept, self.style, self.held_out, self.mirrors)
        return Grid(self.styles, self.concepts, *(t.to(device) for t in tensors))


def load(path: Path | str) -> Grid:
    """The grid in a file that `eval.emoji.build` wrote."""
    with np.load(path) as file:
        text = json.loads(file["text"].tobytes().decode())
        concept, style = (torch.from_numpy(file[k]).long() for k in ("concept", "style"))
        held = torch.from_numpy(file["held_out"])
        names = sorted((k for k in file if k.startswith("sheet")), key=lambda k: int(k[5:]))
        pages = [np.asarray(Image.open(io.BytesIO(file[k].tobytes()))) for k in names]
    side, columns = text["side"], text["columns"]
    rows = pages[0].shape[0] // side
    shape = (rows, side, columns, side, 3)
    cut = [p.reshape(shape).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side) for p in pages]
    pictures = torch.from_numpy(np.concatenate(cut)[: len(concept)].copy())
    concepts = [Concept(c, label, tuple(tags), g, m) for c, label, tags, g, m in text["concepts"]]
    mirrors = torch.tensor([c.mirrors for c in concepts])[concept]
    return Grid(text["styles"], concepts, pictures, concept, style, held, mirrors)


def draw(
    pictures: Tensor, mirrors: Tensor, generator: torch.Generator | None = None, size: int = SIZE
) -> Tensor:
    """Draws of pictures: float (N, 3, size, size) in [-1, 1], on white.

    Each is scaled by 0.88 to 1, turned by up to 4 degrees, moved inside its frame, and, where it
    may be, mirrored with probability 1/2. These changes define the distribution of a cell.

    Args:
        pictures: uint8 (N, 3, S, S).
        mirrors: Whether each may be mirrored, (N,).
        generator: On the pictures' device.
    """
    n, device = len(pictures), pictures.device
    scale, angle, dx, dy, side = torch.rand(5, n, device=device, generator=generator)
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * scale
    angle = (2 * angle - 1) * (ANGLE * math.pi / 180)
    mirror = torch.where(mirrors & (side < 0.5), -1.0, 1.0)
    room = 1 - scale
    return place(pictures, scale, angle, (2 * dx - 1) * room, (2 * dy - 1) * room, mirror, size)


def still(pictures: Tensor, size: int = SIZE) -> Tensor:
    """Pictures in the middle of the frame at the mean scale: float (N, 3, size, size)."""
    zero = torch.zeros(len(pictures), device=pictures.device)
    return place(pictures, zero + sum(SCALE) / 2, zero, zero, zero, zero + 1, size)


def place(
    pictures: Tensor, scale: Tensor, angle: Tensor, dx: Tensor, dy: Tensor, mirror: Tensor,
    size: int,
) -> Tensor:  # fmt: skip
    """Pictures scaled, turned by `angle` (radians), moved by (dx, dy) half frames, and mirrored."""
    cos, sin = angle.cos() / scale, angle.sin() / scale
    x = torch.stack([mirror * cos, mirror * sin, -mirror * (cos * dx + sin * dy)], 1)
    y = torch.stack([-sin, cos, sin * dx - cos * dy], 1)
    grid = affine_grid(torch.stack([x, y], 1), [len(pictures), 3, size, size], align_corners=False)
    ink = 255 - pictures.float()  # white is 0, as the padding is
    ink = grid_sample(ink, grid, "bicubic", "zeros", align_corners=False).clamp(0, 255)
    return 1 - ink / 127.5
