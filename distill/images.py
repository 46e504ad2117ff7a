"""Real data from where a recipe says they are: the embedded digits, or a folder of images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from distill.terminal import notice
from teachers.errors import UserError
from teachers.teacher import Teacher

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def read_folder(folder: Path, teacher: Teacher, classes: int) -> tuple[Tensor, list[int]]:
    """Images (N, C, H, W) in [-1, 1] of the teacher's size, and a label for each.

    Each image's shorter side is resized to fit and its centre cropped. For a class-conditional
    teacher every subfolder is a class, in the order of their names, or of their numbers where all
    are numbers; for any other teacher subfolders mean nothing, and a line on stderr says so.

    Raises:
        UserError: no such folder, no images in it, or more subfolders than classes.
    """
    from PIL import Image
    from torchvision.transforms import functional as tf

    where = f"data.source: {str(folder)!r}"
    if not folder.is_dir():
        raise UserError(f"{where} is not a folder; give 'digits' or a folder of images")
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    if all(p.name.isdecimal() for p in inner):
        inner.sort(key=lambda p: int(p.name))
    if inner and not classes:
        notice(f"{where}: the teacher has no classes, so subfolders are not read as labels")
    groups = inner if classes else [folder]
    if classes and not 1 <= len(groups) <= classes:
        raise UserError(
            f"{where} has {len(groups)} subfolders; the teacher knows {classes} classes, "
            "one subfolder each"
        )
    channels, height, width = teacher.shape
    images, labels = [], []
    for label, group in enumerate(groups):
        for path in sorted(p for p in group.rglob("*") if p.suffix.lower() in SUFFIXES):
            try:
                image = Image.open(path)
                if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
                    raise ValueError(f"mode {image.mode}; save it with 8 bits a channel")
                image = image.convert("L" if channels == 1 else "RGB")
            except Exception as error:  # Pillow's range over many types for a bad file
                raise UserError(
                    f"data.source: {str(path)!r} is not a readable image ({error})"
                ) from None
            scale = max(height / image.height, width / image.width)
            size = [
                max(height, round(image.height * scale)),
                max(width, round(image.width * scale)),
            ]
            image = tf.center_crop(tf.resize(image, size, antialias=True), [height, width])  # pyright: ignore
            images.append(tf.pil_to_tensor(image))  # pyright: ignore
            labels.append(label)
    if not images:
        raise UserError(f"{where} holds no images ({', '.join(sorted(SUFFIXES))})")
    return torch.stack(images).float() / 127.5 - 1, labels
