"""Untrained few-step sampling, against diffusers' own pictures, published times and brute force."""

from itertools import combinations

import pytest
import torch

from distill import baselines
from distill.baselines import Baseline, align_your_steps, arguments, cheapest, searched
from distill.recipe import Recipe
from eval.samples import to_uint8
from teachers import UserError, load
from teachers.analytic import Gaussian
from teachers.solver import ddim

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
    ours, theirs = Baseline(solver=solver), Baseline(scheduler=scheduler)
    denoiser = digits.denoiser
    times = ours.times(denoiser, digits, LABELS, steps)
    a = ours.solved(denoiser, digits, LABELS, 5, times)
    b = theirs.stock(recipe("digits"), digits, LABELS, 5, steps)
    gap = (a.images.int() - b.images.int()).abs()
    assert gap.max() <= 1
    assert (gap > 0).float().mean() < 0.02


@pytest.mark.parametrize("scheduler", baselines.get_args(baselines.Stock))
def test_a_baseline_is_the_teachers_pipeline_with_that_scheduler(shapes, scheduler):
    import diffusers

    found = Baseline(scheduler=scheduler).stock(recipe("shapes", 3.0), shapes, CAPTIONS, 7, 4)
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
    baselines.pipeline(shapes, "UniPCMultistepScheduler")
    assert shapes.codec.pipe.scheduler is before


def test_align_your_steps_are_the_published_noise_levels(shapes):
    published = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152]

    def sigma(times):
        alpha, sigma = shapes.denoiser.process.scales(times)
        return (sigma / alpha).tolist()

    assert sigma(align_your_steps(shapes, 10)) == pytest.approx(published, rel=2e-3)
    # other counts: log σ linear between them, with the same ends
    nineteen = sigma(align_your_steps(shapes, 19))
    assert nineteen[::2] == pytest.approx(published, rel=2e-3)
    assert nineteen[3] == pytest.approx((6.475 * 3.861) ** 0.5, rel=1e-3)
    assert sigma(align_your_steps(shapes, 1)) == pytest.approx(published[:1], rel=2e-3)


def test_a_schedule_that_nobody_published_is_refused(digits):
    with pytest.raises(UserError, match="its authors publish none for 'digits'; use schedule: git"):
        Baseline(solver="ddim", schedule="ays").check(digits)


@pytest.mark.parametrize(
    ("source", "scheduler"), [("digits", "DDIMScheduler"), ("shapes", "EDMEulerScheduler")]
)
def test_a_scheduler_of_another_process_is_refused(source, scheduler, request):
    with pytest.raises(UserError, match="is not of its process; known: "):
        Baseline(scheduler=scheduler).check(request.getfixturevalue(source))


def test_guidance_that_no_stock_pipeline_has_is_refused(digits, shapes):
    with pytest.raises(UserError, match="labels has no guidance"):
        arguments(digits, LABELS, 2.0)
    apg = Recipe.check({
        "teacher": {"source": "shapes", "guidance": {"scale": 3, "kind": "apg"}},
        "objective": {"name": "sid"}, "train": {"steps": 1},
    })  # fmt: skip
    with pytest.raises(UserError, match="guide by kind cfg alone"):
        Baseline(scheduler="DDIMScheduler").stock(apg, shapes, CAPTIONS, 0, 2)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_cheapest_walk_is_the_one_that_trying_all_finds(steps):
    n = 8
    cost = torch.rand(n, n + 1, dtype=torch.float64)
    cost[torch.ones(n, n + 1).tril().bool()] = torch.inf  # nowhere back, nor to itself
    walks = [(0, *inner, n) for inner in combinations(range(1, n), steps - 1)]
    best = min(walks, key=lambda w: sum(cost[i, j] for i, j in zip(w, w[1:], strict=False)))
    assert cheapest(cost, steps) == list(best[:-1])


def test_all_times_are_taken_where_there_are_as_many_steps():
    teacher = Gaussian(torch.zeros(2), torch.tensor([1.0, 0.25]))
    found = searched(teacher, torch.randn(8, 2), 12, fine=12)
    torch.testing.assert_close(found, teacher.process.grid(12))


@pytest.mark.parametrize("steps", [3, 5, 8])
def test_found_times_land_nearer_to_the_true_path_than_the_teachers_own(steps):
    teacher = Gaussian(torch.zeros(2), torch.tensor([1.0, 0.25]))
    z = torch.randn(64, 2)
    x_t = baselines.begun(teacher, z, torch.tensor([1.0]))
    one = torch.ones(64)
    end = teacher.flow(x_t, one, torch.full_like(one, -0.0))

    def error(times):
        return (ddim(teacher, x_t, times) - end).norm(dim=1).mean().item()

    times = searched(teacher, z, steps)
    assert times[0] == 1 and (times.diff() < 0).all() and len(times) == steps
    assert error(times) < 0.8 * error(teacher.process.grid(steps))


def test_more_steps_than_times_are_refused():
    teacher = Gaussian(torch.zeros(2), torch.ones(2))
    with pytest.raises(UserError, match="65 steps are more than the 64"):
        searched(teacher, torch.randn(2, 2), 65)


def test_a_heun_step_counts_twice_but_for_the_last():
    assert Baseline(solver="heun").evaluations(4) == 7
    assert Baseline(scheduler="DDIMScheduler").evaluations(4) == 4


def test_a_baselines_figures_are_the_protocols_of_its_pictures(digits):
    class Kept:  # a protocol that keeps the pictures
        prompts, seen = LABELS, []

        def __call__(self, draw, seeds):
            self.seen.extend(draw(self.prompts, seed).images for seed in range(seeds))
            return {"fd": 1.0}

    kept = Kept()
    b = Baseline(solver="heun")
    assert b.measure(recipe("digits"), digits, kept, 3, 2) == {"fd": 1.0}
    times = digits.denoiser.process.grid(3)
    want = b.solved(digits.denoiser, digits, LABELS, 1, times).images
    assert torch.equal(kept.seen[1], want) and not torch.equal(kept.seen[0], want)
