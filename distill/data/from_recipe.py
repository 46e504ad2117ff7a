"""A recipe's data and conditions as a Source: embedded data sets, or files of the user."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distill.config.recipe import Recipe
from distill.config.schema import PAIRS
from distill.console import print_notice
from distill.data import cache
from distill.data.conditions.part import places_of
from distill.data.encode import COND, EncodingJob, check_finite, picture_shape
from distill.data.expansion.captions import Prompts, expanded, print_summary, read_captions
from distill.data.images import list_images, place_of_images
from distill.data.listing import BadItem, Item, Listing, Partners
from distill.data.pictures import into_buckets, pictured, sizes_of
from distill.data.prompts import list_prompts, place_of_prompts
from distill.data.stream import Source
from eval import digits, shapes
from teachers.conditions import Pictured
from teachers.errors import UserError, clipped
from teachers.families.base import Prompted
from teachers.storage.plugin import called, function_at, is_function
from teachers.teacher import EMBEDDED, Teacher

SHOWN = 10  # pictures in a sample grid, at most
HELD_OUT = 20  # one of so many pictures is held out for the grids
FEW, QUARTER = 4, 4  # but so many of small data, if that is at most one of so many


def source_of(recipe: Recipe, teacher: Teacher) -> Source:
    """Data and conditions of a run, encoded once: in memory, or in a cache.

    Raises:
        UserError: the data do not fit the teacher, or too many items are bad.
    """
    check_pictures(recipe, teacher.codec.pictures)
    seed, codec = recipe.train.seed, teacher.codec
    if recipe.data.source in EMBEDDED:
        return embedded_source(recipe, teacher)
    if is_function(recipe.data.source):
        return own_source(recipe, teacher)
    if (job := encoding_job(recipe, teacher)) is not None:
        return cache.source(job, recipe.data, seed)
    labels: list[Any] = list(range(teacher.codec.classes)) or [0]
    labels = [labels[i] for i in places_of(labels, recipe.data.where, codec.classes)]
    cond = codec.condition(labels)
    tensors = {f"{COND}{k}": v for k, v in (cond or {}).items()}
    check_finite(tensors, [f"label {k}" for k in labels], teacher, "data")
    source = Source(teacher.shape, None, cond, seed, len(labels))
    source.prompts = labels
    return source


def every_prompt(recipe: Recipe, teacher: Teacher) -> list[Any]:
    """The prompts or labels of a recipe's data, those that `data.where` leaves out included.

    No picture is read.

    Raises:
        UserError: they cannot be read.
    """
    data, classes = recipe.data, teacher.codec.classes
    if data.source == "digits":
        return sorted(set(digits.data()[1].tolist()))
    if data.source == "shapes":
        return shapes.all_captions()
    if is_function(data.source):
        whole = data.model_copy(update={"where": None})
        return list(own_source(recipe.model_copy(update={"data": whole}), teacher).prompts or [])
    if (listing := _listing(recipe, teacher)) is None:
        return list(range(classes)) or [0]
    if classes:
        listing.read_labels(classes)
    return list(dict.fromkeys(item.prompt for item in listing.items))


# ---- data sets that come with the package


def embedded_source(recipe: Recipe, teacher: Teacher) -> Source:
    """The digits, or drawings of the shapes.

    Raises:
        UserError: the teacher does not take these images, or these labels or captions.
    """
    refuse_videos(recipe, teacher)
    name, needs_data = str(recipe.data.source), recipe.needs_data
    images, prompts = _digits(teacher) if name == "digits" else _shapes(recipe, teacher)
    if images.shape[1] != (channels := picture_shape(teacher)[0]):
        raise UserError(
            f"data.source: {name!r} has images of {images.shape[1]} channels and the teacher takes "
            f"{channels}; name other images"
        )
    places = places_of(prompts, recipe.data.where, teacher.codec.classes)
    images, prompts = images[places], [prompts[i] for i in places]
    x = None
    if needs_data or name == "digits":  # digits of another size are refused in any case
        x = teacher.codec.encode(images)
        _check_shape(x, teacher, name)
    cond = teacher.codec.condition(prompts)
    tensors = {f"{COND}{k}": v for k, v in (cond or {}).items()} | ({} if x is None else {"x": x})
    names = [f"picture {i} of {prompt!r}" for i, prompt in enumerate(prompts)]
    check_finite(tensors, names, teacher, f"data.source: {name!r}")
    kept = x if needs_data else None
    source = Source(teacher.shape, kept, cond, recipe.train.seed, len(prompts))
    source.prompts = prompts
    return source


def _digits(teacher: Teacher) -> tuple[Tensor, list[Any]]:
    """All digits, in [-1, 1], and their labels."""
    images, labels = digits.data()
    most, classes = int(labels.max()), teacher.codec.classes
    if classes and most >= classes:
        raise UserError(
            f"data.source: 'digits' has label {most}; the teacher knows {classes} classes; "
            "name other images"
        )
    return images, labels.tolist()


def _shapes(recipe: Recipe, teacher: Teacher) -> tuple[Tensor, list[Any]]:
    """Drawings of every caption, in [-1, 1]: ten of each where a run needs real data, else one.

    Ten is also how many the evaluation protocol compares with.
    """
    if teacher.codec.classes or teacher.codec.condition(["a"]) is None:
        raise UserError(
            "data.source: 'shapes' has captions, which this teacher does not read; name images "
            "with labels"
        )
    captions = shapes.all_captions() * (10 if recipe.needs_data else 1)
    return shapes.draw(captions, seed=recipe.train.seed).float() / 127.5 - 1, captions


def _check_shape(x: Tensor, teacher: Teacher, name: str) -> None:
    """Refuse encoded images that are not of the teacher's shape."""
    if x.shape[1:] != teacher.shape:
        given, expected = ("×".join(map(str, s)) for s in (x.shape[1:], teacher.shape))
        raise UserError(
            f"data.source: {name!r} is {given}; the teacher takes {expected}; name other images"
        )


# ---- data of the user's own


def own_source(recipe: Recipe, teacher: Teacher) -> Source:
    """What a function in the user's file returns: data (N, ...), alone or with N labels or prompts.

    Data are as the network takes them: the codec does not encode them.

    Raises:
        UserError: it raises an exception, or returns something else.
    """
    place, codec = str(recipe.data.source), teacher.codec
    key = f"data.source: {clipped(place)!r}"
    result = called(place, "data.source")
    x, prompts = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    x = data_of(x, teacher, key)
    if prompts is None:
        prompts = [0] * len(x)
        if codec.classes or codec.condition([0]) is not None:
            raise UserError(f"{key} returned data alone; return them with N labels or prompts")
    prompts = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
    if len(prompts) != len(x):
        raise UserError(f"{key}: {len(x)} data and {len(prompts)} labels; return as many of each")
    places = places_of(prompts, recipe.data.where, codec.classes)
    x, prompts = x[places], [prompts[i] for i in places]
    cond = codec.condition(prompts)
    tensors = {f"{COND}{k}": v for k, v in (cond or {}).items()} | {"x": x}
    check_finite(tensors, [f"item {i}" for i in places], teacher, key)
    used = x if recipe.needs_data else None
    source = Source(teacher.shape, used, cond, recipe.train.seed, len(x))
    source.prompts = prompts
    return source


def data_of(x: Any, teacher: Teacher, key: str) -> Tensor:
    """Data (N, ...) in float32.

    Raises:
        UserError: they are no tensor of the teacher's shape.
    """
    if not isinstance(x, Tensor) or x.shape[1:] != teacher.shape or not len(x):
        got = "×".join(map(str, x.shape)) if isinstance(x, Tensor) else type(x).__name__
        want = "×".join(map(str, teacher.shape))
        raise UserError(f"{key}: it returned {got}; return a tensor N×{want}, or that and N labels")
    return x.detach().float()


def examples(name: str) -> tuple[Tensor, list[Any]]:
    """Some images of an embedded data set, in [-1, 1], and their labels or captions."""
    if name == "digits":
        images, labels = (v[::60] for v in digits.data())
        return images, labels.tolist()
    captions = shapes.all_captions()[::40]
    return shapes.draw(captions, seed=0).float() / 127.5 - 1, captions


# ---- data from files


def refuse_videos(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse to learn from real videos: no source reads them."""
    if len(teacher.shape) == 4 and recipe.needs_data and recipe.data.source != PAIRS:
        name = recipe.objective["name"]
        critic = recipe.kind.needs_data == "critic"
        remedy = "remove the critic section" if critic else "take another objective, such as dmd2"
        raise UserError(
            f"data.source: {name} learns from real data, but the teacher {teacher.source!r} makes "
            f"videos and only images can be read; {remedy}, and set only data.prompts"
        )


def check_pictures(recipe: Recipe, takes: str) -> None:
    """Refuse data without the pictures that a teacher takes, or with some that it does not take.

    Args:
        takes: As `Codec.pictures`.

    Raises:
        UserError: naming the key.
    """
    data, who = recipe.data, f"teacher {clipped(recipe.teacher.source)!r}"
    for key, kind, act in (("targets", "edit", "edits"), ("masks", "mask", "inpaints")):
        if getattr(data, key) is not None and takes != kind:
            raise UserError(f"data.{key}: {who} is not one that {act} pictures; remove it")
    if not takes:
        return
    if data.source is None or data.source in EMBEDDED or is_function(data.source):
        given = "missing" if data.source is None else f"{clipped(str(data.source))!r}"
        act = "edits" if takes == "edit" else "inpaints"
        raise UserError(
            f"data.source: {given}; {who} {act} pictures, and takes one with each prompt; give a "
            "folder of images with captions, or a table of them"
        )
    if takes == "edit" and recipe.needs_data and data.targets is None:
        raise UserError(
            f"data.targets: missing; {recipe.objective['name']} learns from real data, which for "
            f"{who} are edited pictures; give their folder, or an objective that needs none"
        )


def check_places(recipe: Recipe, teacher: Teacher) -> None:
    """Refuse paths of data or prompts that do not exist; reads no data and does not ask the Hub.

    Raises:
        UserError: naming the key.
    """
    refuse_videos(recipe, teacher)
    check_pictures(recipe, teacher.codec.pictures)
    check_files(recipe)


def check_files(recipe: Recipe) -> None:
    """The part of `check_places` that needs no teacher, and so comes before one is downloaded.

    Raises:
        UserError: naming the key.
    """
    data = recipe.data
    if is_function(data.source):
        function_at(str(data.source), "data.source")
    elif data.source is not None and data.source not in (*EMBEDDED, PAIRS):
        place_of_images(data.source)
    if data.prompts is not None:
        place_of_prompts(data.prompts)
    if data.source is None and data.captions is not None:
        read_captions(data.captions)


def encoding_job(recipe: Recipe, teacher: Teacher) -> EncodingJob | None:
    """The items to encode; None for embedded data, or if labels are the only data."""
    refuse_videos(recipe, teacher)
    check_pictures(recipe, teacher.codec.pictures)
    data, takes = recipe.data, teacher.codec.pictures
    if data.source in (*EMBEDDED, PAIRS) or is_function(data.source):
        return None
    if (listing := _listing(recipe, teacher)) is None:
        return None
    listing.check(listing.bad, listing.total, data.skip_share)
    if classes := teacher.codec.classes:
        listing.read_labels(classes)
    keep_part(listing, recipe, teacher)
    with_data = data.source is not None and recipe.needs_data
    if not with_data and not takes:
        return EncodingJob(teacher, listing, [(0, 0)], False)
    if takes:
        hold_out(listing)
    sizes = sizes_for(recipe, teacher)
    into_buckets(listing, sizes)
    listing.check(listing.bad, listing.total, data.skip_share)
    return EncodingJob(teacher, listing, sizes, with_data)


def keep_part(listing: Listing, recipe: Recipe, teacher: Teacher) -> None:
    """Leave out what `data.where` does not name, and say how much stays.

    Raises:
        UserError: it names what the data do not have.
    """
    if (where := recipe.data.where) is None:
        return
    prompts, total = [item.prompt for item in listing.items], len(listing.items)
    places = places_of(prompts, where, teacher.codec.classes)
    listing.items = [listing.items[i] for i in places]
    print_notice(f"{listing.where}: {len(places):,} of {total:,} items are in data.where")


def hold_out(listing: Listing) -> None:
    """Leave out the pictures that only the sample grids show; says how many they are."""
    listing.items, shown = held_out(listing.items)
    if shown:
        total = len(listing.items) + len(shown)
        print_notice(
            f"{listing.where}: {len(shown)} of {total:,} pictures are for the sample grids alone"
        )
    reason = "the sample grids show it, and no training does"
    listing.left_out += [BadItem(item.name, "held out", reason) for item in shown]


def held_out(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """The items to train on, and those that only the sample grids show: one in twenty, at most ten.

    They are at least four, or a quarter of fewer than sixteen, and spread evenly over the list.
    """
    count = min(SHOWN, max(len(items) // HELD_OUT, min(FEW, len(items) // QUARTER)))
    places = {(2 * i + 1) * len(items) // (2 * count) for i in range(count)}
    parts = ([], [])
    for place, item in enumerate(items):
        parts[place in places].append(item)
    return parts


def shown_prompts(recipe: Recipe, teacher: Teacher) -> list[Pictured]:
    """The prompts of the sample grids, with their pictures; of few data, those of the training.

    Masks that are drawn are never everything, since such a sample does not show the picture.
    """
    listing = _listing(recipe, teacher)
    assert listing is not None
    keep_part(listing, recipe, teacher)
    trained, shown = held_out(listing.items)
    height, width = picture_shape(teacher)[-2:]
    read = [pictured(item, height, width, partial=True) for item in (shown or trained)[:SHOWN]]
    return [part[1] for part in read if not isinstance(part, BadItem)]


def _listing(recipe: Recipe, teacher: Teacher) -> Listing | None:
    """The images or prompts of a recipe; None if labels are the only data."""
    data, classes = recipe.data, teacher.codec.classes
    reads_text = reads_captions(teacher)
    if data.source is not None:
        partners = partners_of(recipe, teacher)
        return list_images(data.source, data.captions, classes, reads_text, partners)
    if data.captions is not None and not reads_text:
        raise UserError(
            f"data.captions: {teacher.source!r} takes no prompts to expand them into; remove it"
        )
    if data.captions is not None:
        return _expanded(recipe)
    if data.prompts is not None and not classes and not reads_text:
        raise UserError(f"data.prompts: {teacher.source!r} takes no prompts; remove it")
    if data.prompts is not None or reads_text:
        return list_prompts(data.prompts or "pack:starter", "label" if classes else "caption")
    return None


def reads_captions(teacher: Teacher) -> bool:
    """Whether a teacher is conditioned on text; one that takes pictures is, and is not tried."""
    codec = teacher.codec
    return not codec.classes and (bool(codec.pictures) or codec.condition([""]) is not None)


def partners_of(recipe: Recipe, teacher: Teacher) -> Partners | None:
    """What comes with each image; None if the teacher takes no pictures."""
    data, takes = recipe.data, teacher.codec.pictures
    return Partners(takes, data.targets, data.masks) if takes else None


def expansion_of(recipe: Recipe) -> Prompts | None:
    """The prompts that a recipe's captions are expanded into; None if it expands none."""
    data = recipe.data
    if data.source is not None or data.captions is None:
        return None
    neutral = list_prompts(data.prompts or "pack:starter")
    neutral.check(neutral.bad, neutral.total, data.skip_share)
    prompts = [i.prompt for i in neutral.items]
    return expanded(data.captions, prompts, recipe.train.seed, data.held_out)


def _expanded(recipe: Recipe) -> Listing:
    """The prompts that captions are expanded into; prints their numbers."""
    prompts = expansion_of(recipe)
    assert prompts is not None
    print_summary(prompts)
    listing = Listing(f"data.captions: {recipe.data.captions!r}")
    listing.items = [Item(f"prompt {i}", p) for i, p in enumerate(prompts.prompts)]
    return listing


def sizes_for(recipe: Recipe, teacher: Teacher) -> list[tuple[int, int]]:
    """Heights and widths in pixels that images are cropped to."""
    data = recipe.data
    _, *sides = picture_shape(teacher)
    height, width = (data.size, data.size) if data.size else sides
    factor, part = sides[0] // teacher.shape[-2], "codec"
    if isinstance(codec := teacher.codec, Prompted) and (grain := codec.grain) > factor:
        factor, part = grain, "network"  # a network that cuts latents into patches
    if height % factor:
        raise UserError(
            f"data.size: {height} is no multiple of {factor}, which the {part} needs; "
            "set it to a multiple"
        )
    if data.buckets and data.buckets.multiple % factor:
        raise UserError(
            f"data.buckets.multiple: {data.buckets.multiple} is no multiple of {factor}, which the "
            f"{part} needs; set it to a multiple"
        )
    sizes = sizes_of(data.buckets, height, width)
    if isinstance(codec, Prompted) and codec.kind.SQUARE and any(h != w for h, w in sizes):
        raise UserError(
            f"data.buckets: {type(codec.pipe).__name__} draws only squares, and so do its "
            "students; remove it"
        )
    return sizes
