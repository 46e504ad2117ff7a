"""The partners of a folder's images: files of the same names in another folder."""

from __future__ import annotations

from pathlib import Path

from eval.images import files_in, is_image
from teachers.errors import UserError
from teachers.storage.files import home


def partners_in(place: str, key: str) -> dict[str, Path]:
    """The images of a folder, by their path in it without its suffix.

    Args:
        key: The recipe's key that names the folder, for messages.

    Raises:
        UserError: there is no such folder, or two of its images differ in the suffix only.
    """
    folder = home(place, key)
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder: {place!r}; give a folder of images")
    found: dict[str, Path] = {}
    for path in filter(is_image, files_in(folder)):
        if (other := found.setdefault(stem_of(path, folder), path)) != path:
            raise UserError(f"{key}: both {other} and {path} are there; keep one of them")
    if not found:
        raise UserError(f"{key}: {place!r} holds no images; give a folder of images")
    return found


def stem_of(path: Path, folder: Path) -> str:
    """The path of an image in its folder, without its suffix."""
    return path.relative_to(folder).with_suffix("").as_posix()
