"""Recipes for published checkpoints: their headers, their plans, and a step on a small likeness."""

import re

import pytest
import torch
from torchvision.utils import save_image

from distill.config.objectives import OBJECTIVES
from distill.config.recipe import SHIPPED, Recipe, read_yaml, shipped
from distill.planning import forecast
from distill.planning.plan import GPUS, RESERVE
from distill.training import build
from students.lora import unwrap
from teachers.catalogue.outlines import OUTLINES, outline
from tests.helpers import edm_pickles, families
from tests.helpers.engines import stream
from tests.helpers.imagenet import PUBLISHED, save

LIKE = {"sd15": "sd", "sdxl": "sdxl", "sd3": "sd3.5", "flux": "flux-dev", "sana": "sana",
        "pixart": "pixart-sigma", "sd15-inpaint": "inpaint", "sdxl-inpaint": "inpaint-xl",
        "flux-kontext": "kontext", "qwen-image-edit": "qwen-edit", "qwen-image": "qwen",
        "flux2-klein": "flux2-klein", "chroma": "chroma", "auraflow": "auraflow",
        "krea2": "krea2"}  # fmt: skip
# Whose families are trained in other tests too, or whose pictures are of a megapixel.
LONG = ("qwen-image-edit", "qwen-image", "flux2-klein", "chroma", "auraflow", "krea2")
BILLIONS = {
    "edm-imagenet-64x64-cond-adm.pkl": 0.296,
    "edm-cifar10-32x32-cond-vp.pkl": 0.0557,
    "edm2-img512-s-2147483-0.130.pkl": 0.2802,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 0.860,
    "stabilityai/stable-diffusion-xl-base-1.0": 2.567,
    "stabilityai/stable-diffusion-3.5-medium": 2.24,
    "black-forest-labs/FLUX.1-dev": 11.9,
    "black-forest-labs/FLUX.2-dev": 32.2,  # 32 on the card
    "black-forest-labs/FLUX.2-klein-base-4B": 3.88,  # 4 on the card
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": 1.60,
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": 0.611,
    "stable-diffusion-v1-5/stable-diffusion-inpainting": 0.860,
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": 2.567,
    "black-forest-labs/FLUX.1-Kontext-dev": 11.9,
    "Qwen/Qwen-Image": 20.4,  # 20 on the card
    "Qwen/Qwen-Image-Edit": 20.4,
    "lodestones/Chroma1-HD": 8.9,
    "fal/AuraFlow-v0.3": 6.86,  # 6.8 on the card
    "krea/Krea-2-Raw": 12.8,  # 12 on the card
    "SiT-XL-2-256x256.pt": 0.675,
    "lightningdit-xl-imagenet256-800ep.pt": 0.675,
    "imagenet256_uvit_huge.pth": 0.501,
}  # of the networks' parameters, as their cards and papers have them; FLUX.2's as our outlines do
BIG = [name for name in shipped() if name.split("/")[0] in (*LIKE, *PUBLISHED, "edm", "edm2")]


def header(name):
    lines = (SHIPPED / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def test_every_recipe_for_a_published_checkpoint_is_among_these():
    small = {"bench", "curves", "digits", "shapes", "teachers"}
    big = {n for n in shipped() if n.split("/")[0] not in small}
    assert big == set(BIG)
    assert all(Recipe.load(n).teacher.source in OUTLINES for n in BIG)


@pytest.mark.parametrize("name", BIG)
def test_a_header_says_what_is_known_what_is_expected_and_what_it_takes(name):
    text = header(name)
    planned, command = r"Planned: [\d.]+ GB on [\w-]+", rf"distill run recipes/{name}\.yaml --out"
    for said in (r"arXiv:\d{4}\.\d{5}", "we expect", "Not yet run at full scale", planned, command):
        assert re.search(said, text, re.IGNORECASE), said


@pytest.mark.parametrize("source", OUTLINES)
def test_an_outlines_network_has_the_published_size(source):
    """Of FLUX.2 the sizes are those of our own outlines, near the billions that its cards name.

    So for FLUX.2 this guards against a change, and proves no more than the order of size.
    """
    network = unwrap(outline(source, torch.device("meta"), precision="bf16").denoiser).backbone
    held = sum(p.numel() for p in network.parameters())
    assert held / 1e9 == pytest.approx(BILLIONS[source], rel=5e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("name", BIG)
def test_a_recipe_is_planned_offline_and_fits_the_card_that_its_header_names(name):
    """Every big recipe's plan, made without a download, fits the card that its header names."""
    found = re.search(r"Planned: ([\d.]+) GB on ([\w-]+)", header(name))
    assert found is not None
    held = forecast.plan(Recipe.load(name)).peak + RESERVE
    assert held == pytest.approx(float(found[1]), abs=0.06)
    assert held <= GPUS[found[2]].memory


def likeness(name, tmp_path):
    """The recipe on a small pipeline of its family; sources, sizes and steps alone are others."""
    family = name.split("/")[0]
    tree = read_yaml(SHIPPED / f"{name}.yaml")
    labels = family in PUBLISHED or family == "edm2"
    if family == "edm2":
        known, _ = edm_pickles.golden()
        source = edm_pickles.save(known["edm2"], tmp_path / "edm2.pkl")
        vae = edm_pickles.save_vae(tmp_path / "vae")
        tree["teacher"] |= {"source": str(source), "vae": str(vae)}
    elif labels:
        tree["teacher"] |= {"source": save(family, tmp_path), "vae": str(tmp_path / "vae")}
    else:
        family = LIKE[family]
        tree["teacher"]["source"] = str(families.build(family, tmp_path / "teacher"))
    if "architecture" in tree["student"]:  # names layers that a small pipeline lacks
        tree["student"]["architecture"] = {"config": {"mid_block_type": None}}
    if size := families.OPTIONS.get(family, {}).get("size"):
        tree["teacher"]["size"] = size
    # Of two samples, some shares of a batch are none or all, and four steps have no sample each.
    whole = OBJECTIVES[tree["objective"]["name"]].shares or "first_step" in tree["objective"]
    batch = 4 if whole else 2
    tree["train"] |= {"steps": 1, "batch": batch, "accumulate": 1, "sample_every": 0}
    photos, prompts = tmp_path / "photos", tmp_path / "prompts.txt"
    photos.mkdir()
    for i in range(2):
        save_image(torch.rand(3, 24, 24), photos / f"{i}.png")
        (photos / f"{i}.txt").write_text("noise")
    prompts.write_text("a red circle\na boat\n")
    data = tree.setdefault("data", {})
    if labels:
        for i in range(2):
            (photos / f"class {i}").mkdir()
            (photos / f"{i}.png").rename(photos / f"class {i}" / "0.png")
            (photos / f"{i}.txt").unlink()
    if "source" in data:
        data |= {"source": str(photos)}
    elif not labels:
        data |= {"prompts": str(prompts)}
    return Recipe.check(tree, name)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n.split("/")[0] in LONG else n
        for n in BIG
        if n.split("/")[0] != "edm"
    ],
)
def test_a_recipes_own_settings_train_a_small_network_of_its_family(name, tmp_path):
    """Every big recipe trains a small network of its family by its own settings."""
    recipe = likeness(name, tmp_path)
    engine = build.build(recipe, tmp_path / "run").engine
    before = {k: [p.clone() for p in v.params] for k, v in engine.players.items()}
    data = stream(engine)
    # where the teacher is not guided, the student has nothing to learn until the fake has moved
    wait = recipe.objective.get("student_every", 0)
    for _ in range(1 if recipe.teacher.guidance != 1 else wait + 1):
        logs = engine.advance(data)
        assert all(torch.isfinite(v) for v in logs.values())
    data.close()
    for player, was in before.items():
        moved = [not torch.equal(a, b) for a, b in zip(was, engine.players[player].params)]
        assert any(moved), player
