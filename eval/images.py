"""Image files as a viewer shows them; folders, shards, tables and references all use this reader.

A viewer rotates a photograph by its EXIF orientation, converts its colours to sRGB, and shows
transparent pixels over its background, here white. Of several frames or pages the first is read.
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

BACKGROUND = "white"  # behind transparent pixels
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI")
MULTI_FRAME = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")  # formats of several frames
# Suffixes of image files that Pillow cannot open, or not on every machine.
UNSUPPORTED = {".avif", ".heic", ".heif", ".hif", ".jxl", ".svg", ".svgz", ".exr", ".hdr", ".tga",
          ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".psd"}  # fmt: skip
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir"}  # made by archives of macOS and by file servers
ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ORIENTATION, WIDTH, HEIGHT, BITS, PHOTOMETRIC = 0x0112, 256, 257, 258, 262  # tags of EXIF and TIFF
MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "LAB": "LAB"}  # of colour spaces in profiles
NO_CACHE = 0x40  # a flag of LittleCMS: threads may share the transform
TOLERANCE = 2  # levels of 255: a profile nearer than this to sRGB counts as sRGB


@cache
def readable() -> tuple[str, ...]:
    """The FORMATS that this version of Pillow opens."""
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


@cache
def suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of files that are read as images."""
    kinds = {*readable(), "MPO"}  # a JPEG with a second image after the first
    return frozenset(k for k, kind in Image.registered_extensions().items() if kind in kinds)


@cache
def unread_suffixes() -> frozenset[str]:
    """The suffixes of image files that are not read: Pillow's other formats, and UNSUPPORTED."""
    readable()
    known = {k for k, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return frozenset((known | UNSUPPORTED) - suffixes())


def is_image(path: str | Path) -> bool:
    """Whether a file has the suffix of an image format that is read."""
    return os.path.splitext(path)[1].lower() in suffixes()


def is_unread(path: str | Path) -> bool:
    """Whether a file has the suffix of an image format that is not read."""
    return os.path.splitext(path)[1].lower() in unread_suffixes()


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is the system's, such as .DS_Store and ._x.jpg."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def files_in(folder: Path) -> list[Path]:
    """Every file in a folder and its subfolders, without hidden ones, in the order of their names.

    Links to folders are followed, except one to a folder that contains it.

    Raises:
        OSError: a folder cannot be read.
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


def open_image(file: Path | BinaryIO) -> Any:
    """Pillow's image of a file; reads the header only.

    Raises:
        OSError, SyntaxError, ValueError, Image.DecompressionBombError: it is no image of FORMATS.
    """
    return Image.open(file, formats=readable())


def size_of(image: Any) -> tuple[int, int]:
    """Width and height after the EXIF rotation; reads the header only."""
    width, height = image.size
    if image.format == "TIFF":  # newer versions of Pillow swap a TIFF's size themselves
        width, height = image.tag_v2[WIDTH], image.tag_v2[HEIGHT]
    return (height, width) if image.getexif().get(ORIENTATION) in ROTATED else (width, height)


def is_first_of_many(image: Any) -> bool:
    """Whether the file holds further frames or pages, which are not read."""
    return image.format in MULTI_FRAME and bool(getattr(image, "is_animated", False))


def is_plain(image: Any) -> bool:
    """Whether its pixels are shown as they are stored; reads the header only."""
    stored = image.mode in ("1", "L", "P", "RGB", "YCbCr", "CMYK")
    upright = image.getexif().get(ORIENTATION, 1) in (0, 1)
    return stored and upright and not {"icc_profile", "transparency"} & image.info.keys()


def to_srgb(image: Any) -> Image.Image:
    """An image as RGB of 8 bits: rotated by EXIF, in sRGB, over BACKGROUND.

    Grey images have three equal channels.

    Raises:
        ValueError: its mode, such as float pixels, has no such form.
        Exception: it is damaged; Pillow raises errors of many types.
    """
    image.load()  # also rotates a TIFF
    bits, inverted = _depth(image)
    image = ImageOps.exif_transpose(image)
    colour, alpha = _parts(image, bits, inverted)
    colour = _in_srgb(colour, image.info.get("icc_profile"))
    if alpha is None:
        return colour
    return Image.composite(colour, Image.new("RGB", colour.size, BACKGROUND), alpha)


def _depth(image: Any) -> tuple[int, bool]:
    """For grey pixels of more than 8 bits: the bits, 0 if unknown, and whether 0 is white."""
    if image.format != "TIFF":
        return 16, False
    if image.mode == "I":  # its values have no fixed range
        return 0, False
    return image.tag_v2.get(BITS, (16,))[0], image.tag_v2.get(PHOTOMETRIC) == 0


def _parts(image: Image.Image, bits: int, inverted: bool) -> tuple[Image.Image, Any]:
    """Colours in mode L, RGB, CMYK or LAB, and opacity in mode L, or None if there is none."""
    if image.mode.startswith("I") and bits:
        return _deep_grey(image, bits, inverted)
    image = _plain_mode(image)
    if image.mode in ("LA", "RGBA"):
        *colours, alpha = image.split()
        return Image.merge("RGB" if len(colours) == 3 else "L", colours), alpha
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        raise ValueError(f"mode {image.mode}; save it with 8 bits a channel")
    return image, None


def _deep_grey(image: Image.Image, bits: int, inverted: bool) -> tuple[Image.Image, Any]:
    """Grey pixels of more than 8 bits as 8 bits, and their opacity."""
    clear = image.info.get("transparency")
    values = np.asarray(image).astype(np.int64)
    top = 2**bits - 1
    grey = (values.clip(0, top) * 255 + top // 2) // top
    grey = (255 - grey if inverted else grey).astype(np.uint8)
    alpha = None if clear is None else Image.fromarray((values != clear).astype(np.uint8) * 255)
    return Image.fromarray(grey), alpha


def _plain_mode(image: Image.Image) -> Image.Image:
    """An image in a mode without palette, key colour or premultiplied opacity, where it has one."""
    mode = image.mode
    keyed = image.info.get("transparency") is not None and mode in ("1", "L", "RGB", "P")
    palette = getattr(image.palette, "mode", "") if mode == "P" else ""
    if keyed or palette.endswith("A") or mode in ("PA", "RGBa"):
        return image.convert("RGBA")
    target = {"La": "LA", "P": "RGB", "RGBX": "RGB", "YCbCr": "RGB", "1": "L"}.get(mode)
    return image if target is None else image.convert(target)


def _in_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """The image as RGB in sRGB. A damaged profile, or one of another colour space, is ignored."""
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted: Any = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        return converted
    transform = _transform(profile, image.mode) if profile else None
    if transform is None:
        return image.convert("RGB")
    return ImageCms.applyTransform(image, transform)  # pyright: ignore[reportReturnType]


@lru_cache(64)
def _transform(profile: bytes, mode: str) -> Any:
    """LittleCMS's transform from a profile to sRGB; None if it changes nothing."""
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if MODES.get(source.profile.xcolor_space.strip().upper()) != mode:
            return None
        srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.PERCEPTUAL
        transform: Any = ImageCms.buildTransform(source, srgb, mode, "RGB", intent, NO_CACHE)  # pyright: ignore
    except (ImageCms.PyCMSError, OSError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(*[levels] * len(mode)), -1).reshape(9, -1, len(mode))
    probe = Image.fromarray(grid.squeeze(-1) if mode == "L" else grid)
    result: Any = ImageCms.applyTransform(probe, transform)
    before, after = (np.asarray(v.convert("RGB")).astype(int) for v in (probe, result))
    return None if abs(before - after).max() <= TOLERANCE else transform
