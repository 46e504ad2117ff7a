"""Benchmarks of published checkpoints: their headers, and every row on a small likeness."""

import re

import pytest
import torch
import yaml
from torchvision.utils import save_image

from distill.benchmark.spec import Bench
from distill.cli import catalogue
from distill.config.recipe import SHIPPED, read_yaml
from distill.config.schema import Known
from distill.sampling.guided_teacher import load_teacher
from distill.training import build
from eval.protocols import spec
from eval.protocols.measure import PROTOCOLS
from teachers.catalogue.outlines import OUTLINES, outline
from teachers.edm import checkpoints
from tests.helpers import edm_pickles, families
from tests.helpers.engines import stream

LIKE = {"sd15": "sd", "sdxl": "sdxl", "sana": "sana", "imagenet64": "adm",
        "cifar10": "ddpmpp-labels"}  # fmt: skip
# The row of each that no recipe of its own has been tried with; the others are slow.
FIRST = {("sd15", "SiD α = 1"), ("sdxl", "Jensen-Shannon"), ("sana", "consistency"),
         ("imagenet64", "consistency"), ("cifar10", "DMD2")}  # fmt: skip
ROWS = [(name, row.name) for name in LIKE for row in Bench.load(f"bench/{name}").rows]
SOME = [r if r in FIRST else pytest.param(*r, marks=pytest.mark.slow) for r in ROWS]


def header(name):
    lines = (SHIPPED / f"bench/{name}.yaml").read_text().splitlines()
    return [line.removeprefix("#").strip() for line in lines if line.startswith("#")]


@pytest.fixture(scope="module", params=LIKE)
def like(request, tmp_path_factory):
    """A benchmark's name, and itself on a small teacher of its family and on a few pictures."""
    name, root = request.param, tmp_path_factory.mktemp(request.param)
    return name, likeness(name, root)


def likeness(name, root):
    """Sources, sizes, counts and the protocol alone are others."""
    tree, family = read_yaml(SHIPPED / f"bench/{name}.yaml"), LIKE[name]
    common = tree["common"]
    photos = root / "photos"
    if family in families.FAMILIES:
        common["teacher"]["source"] = str(families.build(family, root / "teacher"))
        if size := families.OPTIONS.get(family, {}).get("size"):
            common["teacher"]["size"] = size
        folders = [photos] * 4
    else:
        case = edm_pickles.golden()[0][family]
        checkpoints.convert(edm_pickles.save(case, root / "teacher.pkl"), root / "teacher")
        common["teacher"] = str(root / "teacher")
        folders = [photos / f"{i:02}" for i in range(case["arguments"]["label_dim"])]
    for i, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 24, 24), folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("noise")
    common["data"] |= {"source": str(photos), "cache": str(root / "cache")}
    common["train"] |= {"batch": 2, "accumulate": 1}
    common["eval"]["protocol"] = None
    tree["budget"] = {"network_evaluations": 200}
    (root / "bench.yaml").write_text(yaml.safe_dump(tree))
    return Bench.load(str(root / "bench.yaml"))


def test_recipes_know_every_protocol():
    assert set(Known.__args__) == set(PROTOCOLS)


@pytest.mark.parametrize("name", LIKE)
def test_a_header_says_what_it_is_what_it_takes_and_that_nobody_has_measured_it(name):
    first, *_ = text = header(name)
    assert catalogue.recipes()[f"bench/{name}"] == first and first.endswith(".")
    said = " ".join(text)
    command = rf"distill bench recipes/bench/{name}\.yaml --out runs/bench-{name}"
    for wanted in (r"Wants: .*GB", "Estimated, not measured: .* h", r"Budget: .*arXiv:\d{4}\.\d{5}",
                   r"\$\d+", command):  # fmt: skip
        assert re.search(wanted, said), wanted


@pytest.mark.parametrize("name", LIKE)
def test_rows_differ_in_their_objectives_alone(name):
    bench = Bench.load(f"bench/{name}")
    recipes = [bench.recipe(row, 0) for row in bench.rows]
    shared = bench.reference()
    for recipe in recipes:
        same = ("teacher", "adapters", "data", "eval")
        assert all(getattr(recipe, k) == getattr(shared, k) for k in same)
        assert recipe.train == shared.train and recipe.eval.teacher_seeds == 0
    names = [r.objective["name"] for r in recipes]
    assert {"dmd2", "fdistill", "sid", "consistency"} <= set(names)
    critics = [r.critic is not None for r in recipes if r.objective["name"] == "dmd2"]
    assert critics == [True, False]
    assert bench.baselines


@pytest.mark.parametrize("name", LIKE)
def test_a_protocol_is_of_the_teachers_pictures_and_prompts(name):
    recipe = Bench.load(f"bench/{name}").reference()
    written = spec.spec(spec.FOLDER / f"{recipe.eval.protocol}.yaml")
    if name == "cifar10":  # its network is no class of diffusers', so there is no outline
        classes, side = 10, 32
    else:
        assert recipe.teacher.source in OUTLINES
        codec = outline(recipe.teacher.source, torch.device("meta")).codec
        classes, side = codec.classes, codec.size[0]
    assert (written.prompts.classes, written.side or side) == (classes, side)


def test_every_rows_objective_is_built_and_its_steps_are_counted(like):
    """A step of two samples takes from 4 (consistency, its teacher not guided) to 200."""
    _, bench = like
    for row in bench.rows:
        assert 1 <= bench.budget.steps(bench.recipe(row, 0)) <= 50


def test_baselines_draw_finite_pictures(like):
    _, bench = like
    recipe = bench.reference()
    teacher = load_teacher(recipe.teacher)
    prompts = ["1", "0"] if getattr(teacher.codec, "classes", 0) else ["a boat", "a red circle"]
    for baseline in bench.baselines:
        baseline.check(recipe, teacher)
        samples = baseline.sampler(recipe, teacher, prompts, baseline.steps[0])(prompts, 0)
        assert samples.images.float().std() > 1, baseline.name  # bytes; nan would be one colour


@pytest.mark.parametrize(("name", "row"), SOME)
def test_a_rows_own_settings_train_a_small_network_of_its_family(name, row, tmp_path):
    """Two steps or more of every row of the big benchmarks, by its settings, on a small network."""
    bench = likeness(name, tmp_path)
    recipe = bench.recipe(next(r for r in bench.rows if r.name == row), 0, 8)
    engine = build.build(recipe, tmp_path / "run").engine
    before = {k: [p.clone() for p in v.params] for k, v in engine.players.items()}
    data = stream(engine)
    for _ in range(recipe.objective.get("student_every", 1) + 1):
        logs = engine.advance(data)
        assert all(torch.isfinite(v) for v in logs.values())
    data.close()
    for player, was in before.items():
        moved = [not torch.equal(a, b) for a, b in zip(was, engine.players[player].params)]
        assert any(moved), player
