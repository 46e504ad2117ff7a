"""How pictures get to a network's size: the part of a metric that papers leave out.

Every rule takes uint8 (N, C, H, W) and gives float32 (N, C, size, size) in 0 … 255. Greyscale is
repeated to three channels by the extractor, not here.
"""

from __future__ import annotations

from collections.abc import Callable
from math import floor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Resize = Callable[[Tensor, int], Tensor]


def untouched(images: Tensor, size: int) -> Tensor:
    """As they are; the network has a resize of its own."""
    return images.float()


def pil_float(images: Tensor, size: int) -> Tensor:
    """Antialiased bicubic by Pillow, each channel in float32, not rounded to bytes again.

    clean-fid's (Parmar et al. 2022, arXiv:2104.11222).
    """
    planes = [
        np.asarray(
            Image.fromarray(plane.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
        )
        for plane in images.cpu().numpy().reshape(-1, *images.shape[2:])
    ]
    out = torch.from_numpy(np.stack(planes)).view(*images.shape[:2], size, size)
    return out.clamp(0, 255)


def pil_bytes(images: Tensor, size: int) -> Tensor:
    """Antialiased bicubic by Pillow, rounded to bytes: what `Resize` of torchvision does to files.

    dgm-eval's for DINOv2 (Stein et al. 2023, arXiv:2306.04675).
    """
    return pil(images, (size, size), Image.Resampling.BICUBIC).float()


def centre_then_resize(images: Tensor, size: int) -> Tensor:
    """The largest central square, then `pil_bytes`: CMMD's (Jayasumana et al., arXiv:2401.09603).

    The authors' code crops the file with Pillow, half a pixel rounded down, resizes it with
    Pillow's bicubic, and its second resize, on the device, is to the same size.
    """
    return pil_bytes(centre(images, min(images.shape[2:]), floor), size)


def resize_then_centre(images: Tensor, size: int) -> Tensor:
    """The shorter side to `size` by `pil_bytes`' filter, then the central square.

    CLIP's own processor, which PickScore uses; half a pixel is rounded down as in transformers.
    Of square pictures it is `pil_bytes`.
    """
    h, w = images.shape[2:]
    sides = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
    return centre(pil(images, sides, Image.Resampling.BICUBIC), size, floor).float()


def pil(images: Tensor, sides: tuple[int, int], how: Image.Resampling) -> Tensor:
    """Bytes (N, C, H, W) to bytes (N, C, *sides), by Pillow; sides are height and width."""
    if images.shape[2:] == sides:
        return images
    height, width = sides
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), how))
        for plane in images.cpu().numpy().reshape(-1, *images.shape[2:])
    ]
    return torch.from_numpy(np.stack(planes)).view(*images.shape[:2], *sides)


def centre(images: Tensor, side: int, whole: Callable[[float], int] = round) -> Tensor:
    """The central (side, side) of any (N, C, H, W); as much as there is of a smaller picture.

    whole: what makes a corner at half a pixel whole: `round` as torchvision does, to the even
        number, or `floor` as transformers does.
    """
    h, w = (min(side, v) for v in images.shape[2:])
    top, left = (whole((v - s) / 2) for v, s in zip(images.shape[2:], (h, w)))
    return images[:, :, top : top + h, left : left + w]


def centre_square(images: Tensor) -> Tensor:
    """The largest square at the centre."""
    return centre(images, min(images.shape[2:]))


def centre_lanczos(images: Tensor, size: int) -> Tensor:
    """Bytes: the central square, Lanczos to (size, size); COCO's in DMD (arXiv:2311.18828)."""
    return stretched_lanczos(centre_square(images), size)


def stretched_lanczos(images: Tensor, size: int) -> Tensor:
    """Bytes: Lanczos to (size, size), whatever the shape was."""
    return pil(images, (size, size), Image.Resampling.LANCZOS)


def centre_patch(images: Tensor, size: int) -> Tensor:
    """Bytes: the central (size, size), not resized; a picture that is smaller stays as it is.

    Patch FID's, which sees the detail that a resize takes away (arXiv:2402.13929).
    """
    return centre(images, size) if min(images.shape[2:]) >= size else images
