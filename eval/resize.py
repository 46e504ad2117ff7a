"""How pictures get to a network's size: the part of a metric that papers leave out.

Every rule takes uint8 (N, C, H, W) and gives float32 (N, C, size, size) in 0 … 255. Greyscale is
repeated to three channels by the extractor, not here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

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
    return pil(images, size, Image.Resampling.BICUBIC).float()


def torch_bicubic(images: Tensor, size: int) -> Tensor:
    """Bicubic by torch without antialiasing, not clipped: CMMD's (arXiv:2401.09603)."""
    return interpolate(images.float(), (size, size), mode="bicubic")


def pil(images: Tensor, size: int, how: Image.Resampling) -> Tensor:
    """Bytes (N, C, H, W) to bytes (N, C, size, size), by Pillow."""
    if images.shape[2:] == (size, size):
        return images
    planes = [
        np.asarray(Image.fromarray(plane).resize((size, size), how))
        for plane in images.cpu().numpy().reshape(-1, *images.shape[2:])
    ]
    return torch.from_numpy(np.stack(planes)).view(*images.shape[:2], size, size)


def centre(images: Tensor, side: int) -> Tensor:
    """The central (side, side) of any (N, C, H, W); as much as there is of a smaller picture."""
    h, w = (min(side, v) for v in images.shape[2:])
    top, left = (round((v - s) / 2) for v, s in zip(images.shape[2:], (h, w)))
    return images[:, :, top : top + h, left : left + w]


def centre_square(images: Tensor) -> Tensor:
    """The largest square at the centre."""
    return centre(images, min(images.shape[2:]))


def centre_lanczos(images: Tensor, size: int) -> Tensor:
    """Bytes: the central square, Lanczos to (size, size); COCO's in DMD (arXiv:2311.18828)."""
    return pil(centre_square(images), size, Image.Resampling.LANCZOS)


def centre_patch(images: Tensor, size: int) -> Tensor:
    """Bytes: the central (size, size), not resized; a picture that is smaller stays as it is.

    Patch FID's, which sees the detail that a resize takes away (arXiv:2402.13929).
    """
    return centre(images, size) if min(images.shape[2:]) >= size else images
