"""What a tuning learns from: the user's pictures, the teacher's own, captions, neutral prompts."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import save_image

from distill.config.recipe import Recipe
from distill.console import print_notice
from distill.data.expansion.grammar import Grammar
from distill.data.images import list_images
from distill.data.listing import Listing
from distill.data.pictures import Picture, picture
from distill.data.prompts import list_prompts
from distill.files import write
from distill.sampling.guided_teacher import load_teacher
from distill.sampling.teacher_sampler import recipe_sampler
from distill.seeds import seed_of
from eval import shapes
from teachers.errors import UserError, clipped, plural

USUAL = (20, 200)  # numbers of pictures for which this is meant
LEAST = 3  # pictures; DreamBooth's are three to five (arXiv:2208.12242)
PRIOR = 200  # the teacher's own pictures, of neutral prompts
OWN_PROMPTS = NEUTRAL_PROMPTS = 500  # prompts of the student, in this order
DONE = "done"  # a file that says that the pictures beside it are complete


@dataclass(frozen=True)
class Lessons:
    """The user's pictures, and prompts that have nothing to do with them.

    listing: The pictures, with their captions.
    neutral: Prompts that hold the model where it is.
    """

    listing: Listing
    neutral: list[str]

    @property
    def captions(self) -> list[str]:
        """The pictures' captions, each once, in the order of the pictures."""
        return list(dict.fromkeys(one_line(item.prompt) for item in self.listing.items))

    @property
    def share(self) -> int:
        """How many pictures the teacher's LoRA learns of each kind: the user's, and its own."""
        return max(PRIOR, len(self.listing.items))


def lessons(folder: str, neutral: str | None, student: Recipe) -> Lessons:
    """The pictures in a folder, and neutral prompts.

    Args:
        neutral: As `data.prompts` in a recipe; by default the prompts of the student's own run.

    Raises:
        UserError: there are no captioned pictures, or no prompts.
    """
    with named("--data"):
        listing = list_images(folder, None, 0, True)
        listing.check(listing.bad, listing.total, student.data.skip_share)
    low, high = USUAL
    if (count := len(listing.items)) < LEAST:
        raise UserError(
            f"--data: {count} captioned {plural(count, 'picture')} in {clipped(folder)}, and "
            f"{LEAST} are the fewest that a concept is learned from; give {low} to {high}"
        )
    if not low <= count <= high:
        print_notice(f"--data: found {count} captioned pictures; this is meant for {low} to {high}")
    return Lessons(listing, neutral_prompts(neutral, student))


@contextmanager
def named(option: str) -> Iterator[None]:
    """Within it, messages about a recipe's key are about an option."""
    try:
        yield
    except UserError as error:
        reason = str(error).partition(": ")[2]
        raise UserError(f"{option}: {reason}") from None


def neutral_prompts(place: str | None, student: Recipe) -> list[str]:
    """Neutral prompts, each once: those of a file, or of the student's own run."""
    if place is None and "shapes" in (student.data.source, student.teacher.source):
        return shapes.all_captions()
    with named("--neutral"):
        prompts = list_prompts(place or student.data.prompts or "pack:starter")
    return list(dict.fromkeys(line for item in prompts.items if (line := one_line(item.prompt))))


def one_line(prompt: Any) -> str:
    """A caption without line breaks, of which one more would shift all prompts after it."""
    return " ".join(str(prompt).split())


def write_prompts(file: Path, lessons: Lessons, seed: int) -> None:
    """Write the student's prompts: the captions and their phrases combined anew, and neutral ones.

    As many of the new captions as there are captions; no phrase is left out of them.
    """
    rng = random.Random(seed_of(seed, "tune"))
    captions = lessons.captions
    grammar = Grammar.of(captions)
    made = [grammar.caption(rng, grammar.pools, 0.0) for _ in captions]
    own = list(dict.fromkeys([*captions, *made]))
    prompts = cycled(own, OWN_PROMPTS) + cycled(shuffled(lessons.neutral, rng), NEUTRAL_PROMPTS)
    write(file, "".join(f"{p}\n" for p in prompts))


def write_pictures(folder: Path, lessons: Lessons, recipe: Recipe, seed: int) -> None:
    """Write the pictures for the teacher's LoRA: the user's, and as many of the teacher's own.

    The teacher's own hold it where it is (prior preservation, arXiv:2208.12242). The user's come
    first in the order of names, repeated until they are half of all. Nothing is done if the folder
    is complete.

    Args:
        recipe: Of the student, whose teacher draws.
    """
    if (folder / DONE).exists():
        return
    rng = random.Random(seed_of(seed, "prior"))
    prompts = cycled(shuffled(lessons.neutral, rng), lessons.share)
    images = drawn(recipe, prompts, seed)  # before anything is written: the teacher may be refused
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        save_image(image / 255, folder / f"prior-{i:04d}.png")
        write(folder / f"prior-{i:04d}.txt", prompt)
    items = [item for item in lessons.listing.items if item.image is not None]
    for i, item in enumerate(cycled(items, len(prompts))):
        picture = folder / f"own-{i:04d}{Path(item.name).suffix or '.png'}"
        picture.write_bytes(item.image())  # pyright: ignore[reportOptionalCall]
        write(picture.with_suffix(".txt"), one_line(item.prompt))
    write(folder / DONE, "")


@torch.no_grad()
def drawn(recipe: Recipe, prompts: Sequence[str], seed: int) -> Tensor:
    """Pictures (N, 3, H, W), uint8, of a recipe's guided teacher in its many steps."""
    teacher = load_teacher(recipe.teacher)
    sampler = recipe_sampler(recipe, teacher, recipe.eval.teacher_steps)
    return sampler(list(prompts), seed).images


def own_images(lessons: Lessons, height: int, width: int) -> Tensor:
    """The user's pictures (N, 3, H, W), uint8, resized and cropped to a size."""
    read = [picture(item, 3, height, width) for item in lessons.listing.items]
    return torch.stack([image.pixels for image in read if isinstance(image, Picture)])


def cycled(values: Sequence[Any], count: int) -> list[Any]:
    """`count` values: all in their order, again and again."""
    return [values[i % len(values)] for i in range(count)]


def shuffled(values: Sequence[Any], rng: random.Random) -> list[Any]:
    return rng.sample([*values], len(values))
