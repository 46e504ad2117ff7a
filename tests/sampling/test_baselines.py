"""Untrained few-step sampling: diffusers' own pictures, what each picture costs, refusals."""

import pytest
import torch

from distill.config.recipe import Recipe
from distill.sampling import baselines
from distill.sampling.baselines import Baseline
from distill.sampling.teacher_sampler import pipeline
from eval.samples import to_uint8
from teachers import load
from tests.helpers import families
from tests.helpers.refusals import refused

LABELS = [str(i % 10) for i in range(12)]
CAPTIONS = ["a red circle", "two blue squares"]


def recipe(source, guidance=1.0):
    tree = {"teacher": {"source": source, "guidance": guidance}, "objective": {"name": "sid"}}
    return Recipe.check({**tree, "train": {"steps": 1}})


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def shapes():
    return load("shapes")


@pytest.mark.parametrize(
    ("solver", "scheduler"),
    [("ddim", "EDMEulerScheduler"), ("dpmpp_2m", "EDMDPMSolverMultistepScheduler")],
)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_our_solvers_draw_the_pictures_of_diffusers_schedulers(digits, solver, scheduler, steps):
    a, b = (
        v.sampler(recipe("digits"), digits, LABELS, steps)(LABELS, 5)
        for v in (Baseline(solver=solver), Baseline(scheduler=scheduler))
    )
    gap = (a.images.int() - b.images.int()).abs()
    assert gap.max() <= 1
    assert (gap > 0).float().mean() < 0.02


def test_weights_of_half_precision_are_drawn_from_by_stock_schedulers_as_by_our_own_solvers(shapes):
    """bf16 keeps eight bits of what the network says; all else of the pipeline stays in fp32."""
    half = load("shapes", precision="bf16")
    stock, own = Baseline(scheduler="DDIMScheduler"), Baseline(solver="ddim")
    a, b, c, d = (
        kind.sampler(recipe("shapes"), teacher, CAPTIONS, 4)(CAPTIONS, 7).images.float()
        for kind in (stock, own)
        for teacher in (half, shapes)
    )
    assert 0 < (a - b).abs().mean() < 2 * (c - d).abs().mean() < 10
    assert half.denoiser.backbone.dtype == torch.bfloat16
    assert not half.denoiser.backbone._forward_hooks


@pytest.mark.parametrize("scheduler", baselines.get_args(baselines.Stock))
def test_a_baseline_is_the_teachers_pipeline_with_that_scheduler(shapes, scheduler):
    import diffusers

    sampler = Baseline(scheduler=scheduler).sampler(recipe("shapes", 3.0), shapes, CAPTIONS, 4)
    found = sampler(CAPTIONS, 7)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained("teachers/shapes")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        CAPTIONS, num_inference_steps=4, guidance_scale=3.0, output_type="pt",
        generator=torch.Generator().manual_seed(7),
    ).images  # fmt: skip
    assert (found.images.int() - to_uint8(images * 2 - 1).int()).abs().max() <= 1
    assert found.images.float().std() > 20  # pictures, and not a grey nothing


def test_the_teachers_own_scheduler_is_left_as_it_was(shapes):
    before = shapes.codec.pipe.scheduler
    pipeline(shapes, "UniPCMultistepScheduler")
    assert shapes.codec.pipe.scheduler is before


def test_a_schedule_that_nobody_published_is_refused(digits):
    with refused("baselines", "digits"):
        Baseline(solver="ddim", schedule="ays").check(recipe("digits"), digits)


@pytest.mark.parametrize(
    ("source", "scheduler"), [("digits", "DDIMScheduler"), ("shapes", "EDMEulerScheduler")]
)
def test_a_scheduler_of_another_process_is_refused(source, scheduler, request):
    with refused("baselines", "process"):
        Baseline(scheduler=scheduler).check(recipe(source), request.getfixturevalue(source))


def test_guidance_that_no_stock_pipeline_has_is_refused(digits, shapes):
    with refused("baselines", "guidance"):
        Baseline(scheduler="EDMEulerScheduler").check(recipe("digits", 2.0), digits)
    apg = recipe("shapes", {"scale": 3, "kind": "apg"})
    with refused("baselines", "guidance"):
        Baseline(scheduler="DDIMScheduler").check(apg, shapes)


def cost(baseline, recipe, teacher, prompts, steps):
    return baseline.sampler(recipe, teacher, prompts, steps)(prompts, 0).costs


@pytest.mark.parametrize(
    ("words", "guidance", "evaluations"),
    [
        ({"solver": "ddim"}, 1.0, 4),
        ({"solver": "heun"}, 1.0, 7),  # two for a step, but for the last
        ({"solver": "heun"}, 3.0, 14),
        ({"scheduler": "EDMEulerScheduler"}, 1.0, 4),
    ],
)
def test_a_picture_costs_what_its_solver_and_guidance_take(digits, words, guidance, evaluations):
    found = cost(Baseline(**words), recipe("digits", guidance), digits, LABELS, 4)
    assert found == {"evaluations": evaluations}


def test_a_stock_pipeline_costs_twice_where_it_guides(shapes):
    found = cost(Baseline(scheduler="DDIMScheduler"), recipe("shapes", 3.0), shapes, CAPTIONS, 3)
    assert found == {"evaluations": 6}


def test_guidance_in_an_interval_costs_twice_inside_alone(digits):
    where = recipe("digits", {"scale": 3, "interval": [0.5, 100]})
    times = digits.denoiser.process.grid(6)
    alpha, sigma = digits.denoiser.process.scales(times)
    inside = int((sigma / alpha > 0.5).sum())
    assert 0 < inside < 6
    found = cost(Baseline(solver="ddim"), where, digits, LABELS, 6)
    assert found == {"evaluations": 6 + inside}


def test_adaptive_guidance_costs_what_it_has_evaluated(digits, monkeypatch):
    calls = []
    kind, before = type(digits.denoiser), type(digits.denoiser).call
    monkeypatch.setattr(kind, "call", lambda *a: calls.append(len(a[1])) or before(*a))
    baseline = Baseline(solver="ddim", guidance="adaptive", threshold=0.9)
    found = cost(baseline, recipe("digits", 3.0), digits, LABELS, 8)
    assert found == {"evaluations": sum(calls) / len(LABELS)}
    assert 8 < found["evaluations"] < 16


def test_a_threshold_that_no_pair_reaches_is_guidance_in_all_steps(digits, monkeypatch):
    full = Baseline(solver="ddim").sampler(recipe("digits", 3.0), digits, LABELS, 3)
    same = Baseline(solver="ddim", guidance="adaptive").sampler(
        recipe("digits", 3.0), digits, LABELS, 3
    )
    same.threshold = 2.0
    full, same = full(LABELS, 3), same(LABELS, 3)
    assert torch.equal(full.images, same.images)
    assert full.costs == same.costs == {"evaluations": 6}


@pytest.mark.parametrize(
    ("words", "guidance", "whole", "shallow"),
    [
        ({"solver": "ddim", "cache": 3}, 1.0, 2, 3),
        ({"solver": "ddim", "cache": 2}, 3.0, 6, 4),
        ({"solver": "heun", "cache": 2}, 1.0, 5, 4),
        ({"scheduler": "EDMEulerScheduler", "cache": 2}, 1.0, 3, 2),
    ],
)
def test_shallow_evaluations_count_for_their_part_of_the_work(
    digits, words, guidance, whole, shallow
):
    sampler = Baseline(**words).sampler(recipe("digits", guidance), digits, LABELS, 5)
    found = sampler(LABELS, 0).costs
    assert (found["whole_evaluations"], found["shallow_evaluations"]) == (whole, shallow)
    assert 0.2 < sampler.shallow_share < 0.6
    assert found["evaluations"] == pytest.approx(whole + sampler.shallow_share * shallow)


def test_layers_that_inherit_save_their_part_of_the_work(digits):
    """Two layers save less than all inner levels do, and the figure has their share."""
    middle = ("mid_block.resnets.0", "mid_block.resnets.1")
    samplers = [
        Baseline(solver="ddim", cache=2, inherit=names).sampler(recipe("digits"), digits, LABELS, 4)
        for names in ((), middle)
    ]
    all_inner, two = (s(LABELS, 0) for s in samplers)
    assert two.costs["whole_evaluations"] == two.costs["shallow_evaluations"] == 2
    assert all_inner.costs["evaluations"] < two.costs["evaluations"] < 4
    assert not torch.equal(two.images, all_inner.images)
    assert "2 layers inherited 2" in Baseline(solver="ddim", cache=2, inherit=middle).name


def test_every_walk_begins_with_a_whole_evaluation(digits, monkeypatch):
    """What one batch kept is not read in the next: the pictures do not depend on the batch size."""
    sampler = Baseline(solver="ddim", cache=2).sampler(recipe("digits"), digits, LABELS, 3)
    whole = sampler(LABELS, 0).images
    monkeypatch.setattr("distill.sampling.student_sampler.BATCH", 5)
    assert (sampler(LABELS, 0).images.int() - whole.int()).abs().max() <= 1


def test_the_cost_of_a_search_is_told_and_bounded(digits, monkeypatch):
    monkeypatch.setattr("distill.sampling.timesteps.GENERATIONS", 2)
    sampler = Baseline(solver="ddim", schedule="searched").sampler(
        recipe("digits"), digits, LABELS, 3
    )
    some, most = len(LABELS), (12 + 2 * 8) * 3
    found = sampler(LABELS, 0).costs
    assert found["evaluations"] == 3
    fine = 2 * 64 * some  # the paths that GITS is found on, and what all are compared with
    assert fine + 2 * 3 * some < found["search_evaluations"] <= fine + most * some


@pytest.mark.parametrize(
    ("words", "source", "guidance", "line"),
    [
        ({"solver": "ddim", "guidance": "adaptive"}, "digits", 1.0, ("baselines", "1")),
        (
            {"solver": "ddim", "guidance": "adaptive"},
            "digits",
            {"scale": 2, "interval": [0, 1]},
            ("baselines", "interval"),
        ),
        (
            {"solver": "ddim", "cache": 2},
            "digits",
            {"scale": 2, "kind": "skip", "blocks": ["backbone.mid_block"]},
            ("baselines", "interval"),
        ),
        (
            {"solver": "ddim", "schedule": "searched", "steps": [2, 65]},
            "digits",
            1.0,
            ("baselines", "65"),
        ),
        ({"solver": "ddim", "schedule": "gits", "steps": [70]}, "digits", 1.0, ("baselines", "64")),
        (
            {"solver": "ddim", "schedule": "truncated", "steps": [5, 7]},
            "digits",
            1.0,
            ("baselines", "7", "4, 5, 6, 8"),
        ),
    ],
)
def test_what_cannot_be_sampled_so_is_refused(words, source, guidance, line, request):
    with refused(*line) as said:
        Baseline(**words).check(recipe(source, guidance), request.getfixturevalue(source))
    assert str(said.value).startswith("baselines: ddim")


def test_a_transformer_has_no_deep_part(tmp_path):
    teacher = load(str(families.build("dit", tmp_path)))
    with refused("baselines", "DiTTransformer2DModel", "UNet"):
        Baseline(solver="ddim", cache=2).check(recipe(teacher.source), teacher)


def test_names_say_all_that_is_not_usual():
    named = [
        Baseline(solver="heun", schedule="searched"),
        Baseline(solver="ddim", guidance="adaptive"),
        Baseline(solver="ddim", guidance="adaptive", threshold=0.95),
        Baseline(scheduler="UniPCMultistepScheduler", cache=3),
        Baseline(solver="ddim", schedule="truncated", steps=(5,)),
    ]
    assert [b.name for b in named] == [
        "heun, searched",
        "ddim, adaptive guidance",
        "ddim, adaptive guidance 0.95",
        "diffusers UniPC, DeepCache 3",
        "ddim, truncated",
    ]


def test_a_baselines_figures_are_the_protocols_of_its_pictures(digits):
    class Kept:  # a protocol that keeps the pictures
        prompts, seen = LABELS, []

        def __call__(self, draw, seeds):
            self.seen.extend(draw(self.prompts, seed).images for seed in range(seeds))
            return {"fd": 1.0}

    kept, b = Kept(), Baseline(solver="heun")
    found = b.measure(recipe("digits"), digits, kept, 3, 2)
    assert found == {"fd": 1.0}
    want = b.sampler(recipe("digits"), digits, LABELS, 3)(LABELS, 1).images
    assert torch.equal(kept.seen[1], want) and not torch.equal(kept.seen[0], want)
