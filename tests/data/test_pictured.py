"""Pictures that come with prompts: their files, masks, those held out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.utils import save_image

from distill.config.recipe import Recipe
from distill.data import from_recipe
from distill.data.conditions.masks import random_mask
from distill.data.encode import COND
from distill.data.images import list_images
from distill.data.listing import Partners
from distill.data.pictures import pictured
from distill.grids import pictures_of as shown_pictures
from distill.training import build
from teachers import load
from teachers.catalogue.loading import pictures_of
from teachers.conditions import PICTURE
from tests.helpers.datasets import recipe, same, toy
from tests.helpers.refusals import refused

SIDE = 16  # pixels of the small pipeline


@pytest.fixture(scope="module")
def painter(folders):
    return load(folders("inpaint"))


def photos(folder: Path, count: int, size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    """Pictures of noise with captions."""
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(len(folder.name))
    for i in range(count):
        save_image(torch.rand(3, *size, generator=rng), folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"noise {i}")
    return folder


# ---- masks


def test_a_mask_depends_on_its_number_and_its_size_alone():
    assert torch.equal(random_mask(3, 32, 48), random_mask(3, 32, 48))
    assert random_mask(3, 32, 48).shape == (1, 32, 48)
    assert not torch.equal(random_mask(3, 32, 32), random_mask(4, 32, 32))


def test_masks_are_of_zeros_and_ones_in_the_documented_shares():
    masks = torch.stack([random_mask(i, 40, 40) for i in range(300)])
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    areas = masks.flatten(1).mean(1)
    assert (areas == 1).float().mean().item() == pytest.approx(0.2, abs=0.06)
    partial = areas[areas < 1]
    assert partial.min() > 0.005 and partial.max() < 0.99
    assert 0.15 < partial.mean() < 0.6
    assert (areas > 0).all()


def test_a_mask_for_the_grids_is_never_everything():
    for i in range(200):
        mask, shown = random_mask(i, 24, 24), random_mask(i, 24, 24, partial=True)
        assert 0 < shown.mean() < 1
        assert torch.equal(mask, shown) or mask.all()
        assert torch.equal(shown, random_mask(i, 24, 24, partial=True))


# ---- what a batch holds


def test_the_picture_of_a_prompt_is_its_image_with_a_mask_of_its_own(painter, tmp_path):
    folder = photos(tmp_path / "photos", 3)
    source = from_recipe.source_of(recipe("dmd2", source=str(folder)), painter)
    assert source.size == 3 and source.x is None
    vae, cond = painter.codec.pipe.vae, source.cond
    assert cond is not None and cond[PICTURE].shape == (3, 5, 8, 8)
    for i in range(3):
        image = Image.open(folder / f"{i:02d}.png")
        pixels = torch.tensor(list(image.getdata())).view(SIDE, SIDE, 3)
        x = pixels.permute(2, 0, 1)[None] / 127.5 - 1
        mask = random_mask(i, SIDE, SIDE)[None]
        with torch.no_grad():
            hidden = vae.encode(x * (mask < 0.5)).latent_dist.mode() * vae.config.scaling_factor
        torch.testing.assert_close(cond[PICTURE][i : i + 1, 1:], hidden, atol=1e-5, rtol=1e-5)
        assert torch.equal(cond[PICTURE][i : i + 1, :1], interpolate(mask, (8, 8)))
        text = painter.codec.condition([f"noise {i}"])["text"]
        torch.testing.assert_close(cond["text"][i : i + 1], text, atol=1e-5, rtol=1e-5)


def test_masks_are_read_by_the_names_of_their_files(tmp_path):
    folder, masks = photos(tmp_path / "photos", 3), tmp_path / "masks"
    masks.mkdir()
    half = torch.zeros(3, SIDE, SIDE)
    half[:, :, : SIDE // 2] = 1
    save_image(half, masks / "00.jpg")
    save_image(1 - half, masks / "02.png")
    listing = list_images(str(folder), None, 0, True, Partners("mask", masks=str(masks)))
    assert [Path(b.name).name for b in listing.bad] == ["01.png"]
    assert listing.contents[-2:] == [masks / "00.jpg", masks / "02.png"]
    read = [pictured(item, SIDE, SIDE) for item in listing.items]
    for (_, prompt), want in zip(read, (half, 1 - half), strict=True):
        assert torch.equal(prompt.mask, want[:1])


def test_an_edited_picture_is_the_data_and_its_source_the_condition(tmp_path):
    before, after = photos(tmp_path / "before", 2), photos(tmp_path / "edited", 2)
    listing = list_images(str(before), None, 0, True, Partners("edit", targets=str(after)))
    for i, item in enumerate(listing.items):
        assert item.image() == (after / f"{i:02d}.png").read_bytes()
        assert item.picture() == (before / f"{i:02d}.png").read_bytes()
        assert item.mask is None and item.prompt == f"noise {i}"
    alone = list_images(str(before), None, 0, True, Partners("edit"))
    assert all(i.image is None and i.picture is not None for i in alone.items)


def test_a_table_names_pictures_and_their_partners_by_column(tmp_path):
    photos(tmp_path / "before", 2), photos(tmp_path / "edited", 2)
    rows = [
        {"old": f"before/{i:02d}.png", "new": f"edited/{i:02d}.png", "how": f"do {i}"}
        for i in range(2)
    ]
    table = tmp_path / "pairs.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    listing = list_images(f"{table}:old", "how", 0, True, Partners("edit", targets="new"))
    assert [i.prompt for i in listing.items] == ["do 0", "do 1"]
    assert listing.items[1].image() == (tmp_path / "edited/01.png").read_bytes()
    assert listing.items[1].picture() == (tmp_path / "before/01.png").read_bytes()
    with refused("data.targets", "newer"):
        list_images(f"{table}:old", "how", 0, True, Partners("edit", targets="newer"))


@pytest.mark.parametrize("more", [{}, {"buckets": {"multiple": 4}}])
def test_a_cache_holds_the_same_pictures(painter, tmp_path, more):
    folder = photos(tmp_path / "photos", 6, (SIDE, SIDE))
    photos(folder / "wide", 6, (SIDE, 2 * SIDE))
    data = {"source": str(folder), "cache": str(tmp_path / "c"), **more}
    held = from_recipe.source_of(recipe("dmd2", **data), painter)
    same(from_recipe.source_of(recipe("dmd2", **data, in_memory_gb=0), painter), held)
    (root,) = [p for p in (tmp_path / "c").iterdir() if p.is_dir()]
    first = photos(tmp_path / "other", 1) / "00.png"
    first.replace(folder / "00.png")  # another picture makes another cache
    from_recipe.source_of(recipe("dmd2", **data, in_memory_gb=0), painter)
    assert len([p for p in (tmp_path / "c").iterdir() if p.is_dir()]) == 2 and root.is_dir()


def test_noise_is_as_large_as_the_pictures_of_a_bucket(painter, tmp_path):
    folder = photos(tmp_path / "photos", 3)
    photos(folder / "wide", 3, (SIDE, 2 * SIDE))
    r = recipe("dmd2", source=str(folder), buckets={"multiple": 4})
    source = from_recipe.source_of(r, painter)
    shapes = set()
    for draw in range(6):
        batch = source.batch(draw, 0, 1, 2)
        assert batch.noise.shape[2:] == batch.cond[PICTURE].shape[2:]
        shapes.add(tuple(batch.noise.shape[1:]))
    assert len(shapes) == 2 and (4, 8, 8) in shapes


# ---- held out


@pytest.mark.parametrize(("count", "out"), [(3, 0), (7, 1), (24, 4), (85, 4), (120, 6), (400, 10)])
def test_one_in_twenty_and_four_of_small_data_are_held_out(count, out):
    trained, shown = from_recipe.held_out(list(range(count)))  # pyright: ignore
    assert len(shown) == out and sorted(trained + shown) == list(range(count))


def test_grids_show_pictures_that_are_not_trained_on(painter, tmp_path, capsys):
    folder = photos(tmp_path / "photos", 40)
    r = recipe("dmd2", source=str(folder))
    source = from_recipe.source_of(r, painter)
    shown = from_recipe.shown_prompts(r, painter)
    names = ["noise 5", "noise 15", "noise 25", "noise 35"]
    assert source.size == 36 and [str(p) for p in shown] == names
    assert all(0 < p.mask.mean() < 1 for p in shown)
    assert "4 of 40" in capsys.readouterr().err
    out = [Path(file["name"]).name for file in source.report["left_out"]]
    assert out == ["05.png", "15.png", "25.png", "35.png"]
    text = painter.codec.condition(shown)["text"]
    gaps = (source.cond["text"][:, None] - text).flatten(2).abs().amax(2)
    assert gaps.min() > 0.01
    assert shown_pictures(shown).shape == (4, 3, SIDE, SIDE)
    few = recipe("dmd2", source=str(photos(tmp_path / "few", 3)))
    assert len(from_recipe.shown_prompts(few, painter)) == 3


# ---- refusals


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({}, "data.source"),
        ({"prompts": "pack:starter"}, "data.source"),
        ({"source": "shapes"}, "data.source"),
        ({"source": "PHOTOS", "targets": "PHOTOS"}, "data.targets"),
        ({"source": "PHOTOS", "masks": "nowhere"}, "data.masks"),
    ],
)
def test_data_without_the_pictures_that_a_teacher_takes_are_refused(painter, tmp_path, data, key):
    folder = str(photos(tmp_path / "photos", 2))
    data = {k: folder if v == "PHOTOS" else v for k, v in data.items()}
    with refused(key):
        from_recipe.source_of(recipe("dmd2", **data), painter)


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        ("Qwen/Qwen-Image-Edit", "edit"),
        ("diffusers/stable-diffusion-xl-1.0-inpainting-0.1", "mask"),
        ("stabilityai/stable-diffusion-xl-base-1.0", ""),
        ("someone/something", None),
        ("digits", None),
    ],
)
def test_what_a_teacher_takes_is_known_before_it_is_loaded(source, takes):
    assert pictures_of(source) == takes


def test_text_alone_is_refused_before_the_teacher_is_loaded(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "load_teacher", lambda section: pytest.fail("it was loaded"))
    for source in (folders("inpaint"), "black-forest-labs/FLUX.1-Kontext-dev"):
        tree = {"teacher": source, "objective": {"name": "dmd2"}, "train": {"steps": 1}}
        with refused("data.source", source):
            build.build(Recipe.check(tree), tmp_path / "run")


@pytest.mark.parametrize("key", ["targets", "masks"])
def test_pictures_are_refused_for_a_teacher_of_text_alone(tmp_path, key):
    folder = str(photos(tmp_path / "photos", 2))
    with refused(f"data.{key}"):
        from_recipe.source_of(recipe("dmd2", source=folder, **{key: folder}), toy())
    with refused(f"data.{key}"):
        recipe("dmd2", **{key: folder})


def test_a_mask_that_cannot_be_read_is_a_bad_item(painter, tmp_path):
    folder, masks = photos(tmp_path / "photos", 2), photos(tmp_path / "masks", 2)
    (masks / "01.png").write_bytes(b"no image")
    r = recipe("dmd2", source=str(folder), masks=str(masks), skip_share=0.5)
    source = from_recipe.source_of(r, painter)
    assert source.size == 1 and "01.png" in source.report["files"][0]["name"]
    assert f"{COND}{PICTURE}" in from_recipe.encoding_job(r, painter).shapes(0)
