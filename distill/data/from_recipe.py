"""The data and conditions that a recipe asks for, as a Source."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill.config.recipe import Recipe
from distill.config.schema import DataSection
from distill.data import cache
from distill.data.encode import COND, Work, check_finite, picture_shape
from distill.data.images import list_images, place_of_images
from distill.data.pictures import into_buckets, sizes_of
from distill.data.prompts import list_prompts, place_of_prompts
from distill.data.stream import Source
from eval import digits, shapes
from teachers.errors import UserError
from teachers.families.base import Prompted
from teachers.teacher import EMBEDDED, Teacher


def source_of(recipe: Recipe, teacher: Teacher) -> Source:
    """Data and conditions as the recipe says, encoded once: in memory, or in a cache.

    Raises:
        UserError: the data are not of the teacher's kind, or too many of them are bad.
    """
    seed, codec = recipe.train.seed, teacher.codec
    if recipe.data.source in EMBEDDED:
        return embedded_source(recipe, teacher)
    if (work := work_of(recipe, teacher)) is not None:
        return cache.source(work, recipe.data, seed)
    labels = list(range(getattr(codec, "classes", 0))) or [0]
    cond = codec.condition(labels)
    named = {f"{COND}{k}": v for k, v in (cond or {}).items()}
    check_finite(named, [f"label {k}" for k in labels], teacher, "data")
    return Source(teacher.shape, None, cond, seed, len(labels))


def embedded_source(recipe: Recipe, teacher: Teacher) -> Source:
    """The digits, or drawings of the shapes, as many as the caption protocol compares with."""
    refuse_videos(recipe, teacher)
    name, codec = str(recipe.data.source), teacher.codec
    classes = getattr(codec, "classes", 0)
    needed = needs_data(recipe)
    if name == "digits":
        images, numbers = digits.data()
        prompts: list[Any] = numbers.tolist()
        if classes and max(prompts) >= classes:
            raise UserError(
                f"data.source: 'digits' has label {max(prompts)}; "
                f"the teacher knows {classes} classes"
            )
    else:
        if classes or codec.condition(["a"]) is None:
            raise UserError("data.source: 'shapes' has captions, which this teacher does not read")
        prompts = shapes.all_captions() * (10 if needed else 1)
        images = shapes.draw(prompts, seed=recipe.train.seed).float() / 127.5 - 1
    if images.shape[1] != (channels := picture_shape(teacher)[0]):
        raise UserError(
            f"data.source: {name!r} has pictures of {images.shape[1]} channels; "
            f"the teacher takes {channels}"
        )
    x = codec.encode(images) if needed or name == "digits" else None
    if x is not None and x.shape[1:] != teacher.shape:
        want, got = ("×".join(map(str, s)) for s in (teacher.shape, x.shape[1:]))
        raise UserError(f"data.source: {name!r} is {got}; the teacher takes {want}")
    cond = codec.condition(prompts)
    made = {f"{COND}{k}": v for k, v in (cond or {}).items()} | ({} if x is None else {"x": x})
    names = [f"picture {i} of {prompt!r}" for i, prompt in enumerate(prompts)]
    check_finite(made, names, teacher, f"data.source: {name!r}")
    return Source(teacher.shape, x if needed else None, cond, recipe.train.seed, len(prompts))


def examples(name: str) -> tuple[Tensor, list[Any]]:
    """Some of what an embedded teacher was trained on, in [-1, 1], and what it shows."""
    if name == "digits":
        images, labels = (v[::60] for v in digits.data())
        return images, labels.tolist()
    captions = shapes.all_captions()[::40]
    return shapes.draw(captions, seed=0).float() / 127.5 - 1, captions


def needs_data(recipe: Recipe) -> bool:
    """Whether batches must hold real data, or prompts and labels will do."""
    kind = recipe.kind
    critic = kind.needs_data == "critic" and recipe.critic is not None
    return kind.needs_data == "always" or critic


def refuse_videos(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse to learn from real videos, which no source holds."""
    if len(teacher.shape) == 4 and needs_data(recipe):
        name = recipe.objective["name"]
        critic = recipe.kind.needs_data == "critic"
        remedy = "remove the critic section" if critic else "take another, such as dmd2"
        raise UserError(
            f"data.source: {name} learns from real data, the teacher {teacher.source!r} makes "
            f"videos, and only images can be read as yet; {remedy}, with data.prompts alone"
        )


def check_places(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse data or prompts that are not there; none are read, and the Hub is not asked.

    Raises:
        UserError: naming the key.
    """
    refuse_videos(recipe, teacher)
    data = recipe.data
    if data.source is not None and data.source not in EMBEDDED:
        place_of_images(data.source)
    if data.prompts is not None:
        place_of_prompts(data.prompts)


def work_of(recipe: Recipe, teacher: Teacher) -> Work | None:
    """What there is to encode; None where labels are all, or data are embedded."""
    refuse_videos(recipe, teacher)
    data, codec = recipe.data, teacher.codec
    if data.source in EMBEDDED:
        return None
    classes = getattr(codec, "classes", 0)
    reads_text = not classes and codec.condition([""]) is not None
    with_data, sizes = False, [(0, 0)]
    if data.source is not None:
        listing = list_images(data.source, data.captions, classes, reads_text)
    elif data.prompts is not None and not classes and not reads_text:
        raise UserError(f"data.prompts: {teacher.source!r} takes no prompts; remove it")
    elif data.prompts is not None or reads_text:
        needs = "label" if classes else "caption"
        listing = list_prompts(data.prompts or "pack:starter", needs)
    else:
        return None
    listing.check(listing.bad, listing.total, data.skip_share)
    if classes:
        listing.read_labels(classes)
    if data.source is not None and (with_data := needs_data(recipe)):
        sizes = sizes_for(data, teacher)
        into_buckets(listing, sizes)
        listing.check(listing.bad, listing.total, data.skip_share)
    return Work(teacher, listing, sizes, with_data)


def sizes_for(data: DataSection, teacher: Teacher) -> list[tuple[int, int]]:
    """Heights and widths that images are cut to."""
    _, *sides = picture_shape(teacher)
    height, width = (data.size, data.size) if data.size else sides
    factor, needs = sides[0] // teacher.shape[-2], "codec"
    if isinstance(codec := teacher.codec, Prompted) and (grain := codec.grain) > factor:
        factor, needs = grain, "network"  # which reads latents in patches
    if height % factor:
        raise UserError(f"data.size: {height} is no multiple of {factor}, as the {needs} needs")
    if data.buckets and data.buckets.multiple % factor:
        raise UserError(
            f"data.buckets.multiple: {data.buckets.multiple} is no multiple of {factor}, "
            f"as the {needs} needs"
        )
    sizes = sizes_of(data.buckets, height, width)
    if isinstance(codec, Prompted) and codec.kind.SQUARE and any(h != w for h, w in sizes):
        raise UserError(
            f"data.buckets: {type(codec.pipe).__name__} draws squares alone, and so would its "
            "students; remove it"
        )
    return sizes
