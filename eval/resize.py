"""Rules that resize images to a network's size; papers often do not state theirs.

Every rule takes uint8 (N, C, H, W) and gives float32 (N, C, size, size) in 0 … 255, unless it says
otherwise. The extractor repeats grey images to three channels, not these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

Resize = Callable[[Tensor, int], Tensor]


def untouched(images: Tensor, size: int) -> Tensor:
    """The images as they are; the network has its own resize."""
    return images.float()


def pil_float(images: Tensor, size: int) -> Tensor:
    """Antialiased bicubic by Pillow, each channel in float32, not rounded to bytes again.

    It is clean-fid's rule (Parmar et al. 2022, arXiv:2104.11222).
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
    """Antialiased bicubic by Pillow, rounded to bytes, as torchvision's `Resize` does with files.

    It is dgm-eval's rule for DINOv2 (Stein et al. 2023, arXiv:2306.04675).
    """
    return pil(images, (size, size), Image.Resampling.BICUBIC).float()


def centre_then_resize(images: Tensor, size: int) -> Tensor:
    """The largest central square, then `pil_bytes`: CMMD's rule (arXiv:2401.09603).

    The authors' code crops the file with Pillow, half a pixel rounded down, and resizes it with
    Pillow's bicubic. Its second resize, on the device, is to the same size and changes nothing.
    """
    return pil_bytes(centre(images, min(images.shape[2:]), floor), size)


def resize_then_centre(
    images: Tensor, size: int, rounding: Callable[[float], int] = floor
) -> Tensor:
    """The shorter side to `size` with the filter of `pil_bytes`, then the central square.

    It is the rule of CLIP's own processor, which PickScore uses; half a pixel is rounded down as in
    transformers, or by another `rounding`. For square images it equals `pil_bytes`.
    """
    resized = pil(images, covering(images.shape[2:], size), Image.Resampling.BICUBIC)
    return centre(resized, size, rounding).float()


def covering(sides: Sequence[int], size: int) -> tuple[int, int]:
    """Height and width of an image whose shorter side is to be `size`, as CLIP's processors round.

    Args:
        sides: Its height and width before.
    """
    height, width = sides
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def fit_then_pad(images: Tensor, size: int) -> Tensor:
    """The longer side to `size` by torch's antialiased bicubic, then black around it.

    Images are (N, C, H, W) in any range whose black is 0, and keep their graph; nothing is rounded
    or clamped. It is the rule of HPS v2's package with a current torchvision.
    """
    exact = images.float() if images.dtype == torch.uint8 else images
    height, width = (max(1, round(v * size / max(images.shape[2:]))) for v in images.shape[2:])
    small = exact if images.shape[2:] == (height, width) else bicubic(exact, (height, width))
    top, left = (size - height) // 2, (size - width) // 2
    return pad(small, [left, size - width - left, top, size - height - top])


def bicubic(images: Tensor, sides: tuple[int, int]) -> Tensor:
    """Images (N, C, H, W) at (N, C, *sides) by torch's antialiased bicubic, with their graph."""
    return interpolate(images, sides, mode="bicubic", antialias=True, align_corners=False)


def pil(images: Tensor, sides: tuple[int, int], method: Image.Resampling) -> Tensor:
    """From bytes (N, C, H, W) to bytes (N, C, *sides) by Pillow; sides are height and width."""
    if images.shape[2:] == sides:
        return images
    height, width = sides
    planes = [
        np.asarray(Image.fromarray(plane).resize((width, height), method))
        for plane in images.cpu().numpy().reshape(-1, *images.shape[2:])
    ]
    return torch.from_numpy(np.stack(planes)).view(*images.shape[:2], *sides)


def centre(images: Tensor, side: int, rounding: Callable[[float], int] = round) -> Tensor:
    """The central (side, side) of images (N, C, H, W); a smaller image stays as it is.

    rounding: for a corner at half a pixel: `round` (to even) as in torchvision, or `floor` as in
        transformers.
    """
    h, w = (min(side, v) for v in images.shape[2:])
    top, left = (rounding((v - s) / 2) for v, s in zip(images.shape[2:], (h, w)))
    return images[:, :, top : top + h, left : left + w]


def centre_square(images: Tensor) -> Tensor:
    """The largest square at the centre."""
    return centre(images, min(images.shape[2:]))


def centre_lanczos(images: Tensor, size: int) -> Tensor:
    """Bytes: the central square, then Lanczos to (size, size), as DMD does (arXiv:2311.18828)."""
    return stretched_lanczos(centre_square(images), size)


def stretched_lanczos(images: Tensor, size: int) -> Tensor:
    """Bytes: Lanczos to (size, size), whatever the aspect ratio."""
    return pil(images, (size, size), Image.Resampling.LANCZOS)


def centre_patch(images: Tensor, size: int) -> Tensor:
    """Bytes: the central (size, size), not resized; a smaller image stays as it is.

    It is the rule of patch FID, which measures the detail that a resize removes (arXiv:2402.13929).
    """
    return centre(images, size) if min(images.shape[2:]) >= size else images
