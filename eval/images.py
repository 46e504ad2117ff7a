"""Image files as a viewer shows them: the one reader of folders, shards, tables and references.

A viewer turns a photograph upright, converts its colours to sRGB, and shows what is transparent
over its background, here white. Of several frames or pages the first is read.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps

BACKGROUND = "white"  # what shows through transparent pixels
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")
MANY = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")  # formats of which a file may hold several frames
# Suffixes of image files that Pillow cannot open, or not everywhere.
OTHERS = {".avif", ".heic", ".heif", ".hif", ".jxl", ".svg", ".svgz", ".exr", ".hdr", ".tga",
          ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".psd"}  # fmt: skip
SYSTEM = {"__MACOSX", "@eaDir"}  # folders that unpacking and file servers leave behind
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ORIENTATION, WIDTH, HEIGHT, BITS, PHOTOMETRIC = 0x0112, 256, 257, 258, 262  # tags of EXIF and TIFF
SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "LAB": "LAB"}  # a profile's, and Pillow's mode
NO_CACHE = 0x40  # of LittleCMS: a transform that threads may share
SAME = 2  # levels of 255 by which a profile may differ from sRGB and count as it


@cache
def readable() -> tuple[str, ...]:
    """Of FORMATS, those that this Pillow opens."""
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


@cache
def suffixes() -> frozenset[str]:
    """How names of files that are read as images end, in lower case."""
    kinds = {*readable(), "MPO"}  # which is JPEG with a second picture after the first
    return frozenset(k for k, kind in Image.registered_extensions().items() if kind in kinds)


@cache
def unread_suffixes() -> frozenset[str]:
    """How names of image files end that are not read: of Pillow's other formats, and of OTHERS."""
    readable()
    known = {k for k, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return frozenset((known | OTHERS) - suffixes())


def is_image(path: str | Path) -> bool:
    """Whether a file's name says that it is an image of a format that is read."""
    return os.path.splitext(path)[1].lower() in suffixes()


def is_unread(path: str | Path) -> bool:
    """Whether a file's name says that it is an image of a format that is not read."""
    return os.path.splitext(path)[1].lower() in unread_suffixes()


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is no user's, such as .DS_Store and ._x.jpg."""
    return name.startswith(".") or name in SYSTEM


def files_in(folder: Path) -> list[Path]:
    """Every file in a folder and the folders in it, but for hidden ones, in order of their names.

    Links to folders are followed, but for one to a folder that it lies in.

    Raises:
        OSError: a folder cannot be looked into.
    """
    return sorted(_walk(folder, frozenset()))


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    if (real := os.path.realpath(folder)) in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, above | {real})
            else:
                yield folder / entry.name


# ---- one file


def opened(file: Path | BinaryIO) -> Any:
    """Pillow's image, of which only the header is read yet.

    Raises:
        OSError, SyntaxError, ValueError, Image.DecompressionBombError: it is none that is read.
    """
    return Image.open(file, formats=readable())


def size_of(image: Any) -> tuple[int, int]:
    """Width and height once upright; nothing but the header is read."""
    width, height = image.size
    if image.format == "TIFF":  # which newer versions of Pillow turn by themselves
        width, height = image.tag_v2[WIDTH], image.tag_v2[HEIGHT]
    return (height, width) if image.getexif().get(ORIENTATION) in TURNED else (width, height)


def is_first_of_many(image: Any) -> bool:
    """Whether the file holds further frames or pages, none of which is read."""
    return image.format in MANY and bool(getattr(image, "is_animated", False))


def is_plain(image: Any) -> bool:
    """Whether its pixels are shown as they are stored; nothing but the header is read."""
    stored = image.mode in ("1", "L", "P", "RGB", "YCbCr", "CMYK")
    upright = image.getexif().get(ORIENTATION, 1) in (0, 1)
    return stored and upright and not {"icc_profile", "transparency"} & image.info.keys()


def shown(image: Any) -> Image.Image:
    """An image as RGB of 8 bits: upright, in sRGB, over BACKGROUND.

    Grey images give three equal channels.

    Raises:
        ValueError: its pixels are of a kind that has no such form, such as floats.
        Exception: it is damaged; Pillow's errors range over many types.
    """
    image.load()  # which turns a TIFF upright
    bits, inverted = _depth(image)
    image = ImageOps.exif_transpose(image)
    colour, alpha = _parts(image, bits, inverted)
    colour = _in_srgb(colour, image.info.get("icc_profile"))
    if alpha is None:
        return colour
    return Image.composite(colour, Image.new("RGB", colour.size, BACKGROUND), alpha)


def _depth(image: Any) -> tuple[int, bool]:
    """Of grey pixels of more than 8 bits: how many bits, 0 if unknown, and whether 0 is white."""
    if image.format != "TIFF":
        return 16, False
    if image.mode == "I":  # whose values may be anything
        return 0, False
    return image.tag_v2.get(BITS, (16,))[0], image.tag_v2.get(PHOTOMETRIC) == 0


def _parts(image: Image.Image, bits: int, inverted: bool) -> tuple[Image.Image, Any]:
    """Colours in mode L, RGB, CMYK or LAB, and opacity in mode L, or None if there is none."""
    mode, clear = image.mode, image.info.get("transparency")
    if mode.startswith("I") and bits:
        values = np.asarray(image).astype(np.int64)
        top = 2**bits - 1
        grey = (values.clip(0, top) * 255 + top // 2) // top
        grey = (255 - grey if inverted else grey).astype(np.uint8)
        alpha = None if clear is None else Image.fromarray((values != clear).astype(np.uint8) * 255)
        return Image.fromarray(grey), alpha
    keyed = clear is not None and mode in ("1", "L", "RGB", "P")
    palette = getattr(image.palette, "mode", "") if mode == "P" else ""
    if keyed or palette.endswith("A") or mode in ("PA", "RGBa"):
        image = image.convert("RGBA")
    elif mode == "La":
        image = image.convert("LA")
    elif mode in ("P", "RGBX", "YCbCr"):
        image = image.convert("RGB")
    elif mode == "1":
        image = image.convert("L")
    if image.mode in ("LA", "RGBA"):
        *colours, alpha = image.split()
        return Image.merge("RGB" if len(colours) == 3 else "L", colours), alpha
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        raise ValueError(f"mode {mode}; save it with 8 bits a channel")
    return image, None


def _in_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """As RGB in sRGB. A profile that is damaged, or of another kind than its pixels, is ignored."""
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        found: Any = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        return found
    transform = _transform(profile, image.mode) if profile else None
    if transform is None:
        return image.convert("RGB")
    return ImageCms.applyTransform(image, transform)  # pyright: ignore[reportReturnType]


@lru_cache(64)
def _transform(profile: bytes, mode: str) -> Any:
    """LittleCMS's transform of a profile's colours to sRGB; None where there is nothing to do."""
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if SPACES.get(source.profile.xcolor_space.strip().upper()) != mode:
            return None
        srgb, how = ImageCms.createProfile("sRGB"), ImageCms.Intent.PERCEPTUAL
        made: Any = ImageCms.buildTransform(source, srgb, mode, "RGB", how, NO_CACHE)  # pyright: ignore
    except (ImageCms.PyCMSError, OSError, TypeError):
        return None
    if mode == "CMYK":
        return made
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(*[levels] * len(mode)), -1).reshape(9, -1, len(mode))
    probe = Image.fromarray(grid.squeeze(-1) if mode == "L" else grid)
    found: Any = ImageCms.applyTransform(probe, made)
    as_is, seen = (np.asarray(v.convert("RGB")).astype(int) for v in (probe, found))
    return None if abs(as_is - seen).max() <= SAME else made
