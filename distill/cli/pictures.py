"""Pictures that come with the prompts of `distill sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.cli.options import expand_home


def with_pictures(
    teacher: Any, prompts: list[str], images: list[Path], masks: list[Path]
) -> list[Any]:
    """The prompts, each with its picture and its mask, for a student that takes pictures.

    Args:
        images, masks: One file, or one for each prompt.

    Raises:
        UserError: an option does not suit the student, or a file cannot be read.
    """
    from distill.data.listing import BadItem, Item
    from distill.data.pictures import pictured
    from teachers.errors import UserError, cut

    images, masks = ([expand_home(p) or p for p in files] for files in (images, masks))
    check_files(teacher.codec.pictures, len(prompts), images, masks)
    if not images:
        return prompts
    read: list[Any] = []
    for i, prompt in enumerate(prompts):
        image = images[i % len(images)]
        mask = masks[i % len(masks)].read_bytes if masks else None
        item = Item(str(image), prompt, picture=image.read_bytes, mask=mask)
        result = pictured(item, *teacher.codec.size[-2:])
        if isinstance(result, BadItem):
            raise UserError(f"--image {cut(str(image))}: {result.reason}; give another")
        read.append(result[1])
    return read


def check_files(takes: str, count: int, images: list[Path], masks: list[Path]) -> None:
    """Refuse files that do not suit a student, or do not exist.

    Args:
        takes: As `Codec.pictures`.
        count: The number of prompts.

    Raises:
        UserError: naming the option.
    """
    from teachers.errors import UserError, cut

    if images and not takes:
        raise UserError("--image: this student takes no picture; leave the option out")
    if masks and takes != "mask":
        raise UserError("--mask: this student does not paint in pictures; leave the option out")
    if takes and not images:
        raise UserError("--image: missing; this student takes a picture with each prompt: add it")
    if takes == "mask" and not masks:
        raise UserError(
            "--mask: missing; this student paints in pictures: add one, white where --image is "
            "painted anew"
        )
    for option, files in (("--image", images), ("--mask", masks)):
        if len(files) not in (0, 1, count):
            raise UserError(
                f"{option}: {len(files)} files for {count} prompts; give one, or one for each"
            )
        if absent := [path for path in files if not path.is_file()]:
            raise UserError(f"{option} {cut(str(absent[0]))}: no such file; give an image")
