"""Guidance, checked in closed form on Gaussian teachers; g = 1 is unguided everywhere."""

from copy import deepcopy

import pytest
import torch
import yaml
from torch import nn

from distill.config.recipe import Recipe
from distill.sampling import guided_teacher
from teachers import load
from teachers.analytic import Gaussian
from teachers.denoiser import Denoiser, Guided, Network, Reparametrised, linear
from teachers.guidance import (
    Adaptive,
    AutoGuided,
    Interval,
    Projected,
    Rescaled,
    SkipLayerGuided,
    describe,
)
from teachers.process import Karras, Linear
from teachers.solver import cfgpp, ddim, solve
from tests.helpers import families
from tests.helpers.refusals import refused

D = 6


class Conditional(Denoiser):
    """N(mean of the label, I) in closed form; counts the samples that it is asked for."""

    def __init__(self, means, process=None):
        super().__init__()
        self.register_buffer("means", means)
        self.process, self.samples = process or Karras(), 0

    def forward(self, x_t, t, cond=None, s=None):
        self.samples += len(x_t)
        alpha, sigma = self.process.at(t, x_t)
        mean = self.means[cond["class_labels"]]
        return mean + alpha / (alpha**2 + sigma**2) * (x_t - alpha * mean)


@pytest.fixture
def teacher():
    return Conditional(torch.randn(4, D, dtype=torch.double))


@pytest.fixture
def point():
    """x_t, t and the condition of five samples."""
    labels = {"class_labels": torch.tensor([0, 1, 2, 0, 1])}
    return 3 * torch.randn(5, D, dtype=torch.double), torch.rand(5, dtype=torch.double), labels


NULL = {"class_labels": torch.tensor([3])}
MIXES = [linear, Projected(), Projected(0.3, 0.5), Rescaled(0.7), Rescaled(1.0, Projected(0.2))]


def kinds(denoiser, scale, mix=linear):
    weaker = Gaussian(torch.zeros(D, dtype=torch.double), torch.ones(D, dtype=torch.double))
    return [
        Guided(denoiser, scale, NULL, mix),
        AutoGuided(denoiser, scale, weaker, mix),
        Interval(Guided(denoiser, scale, NULL, mix), 0.01, 10),
    ]


@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "linear" if m is linear else str(m))
def test_scale_one_is_unguided_bit_for_bit_and_costs_one_evaluation(teacher, point, mix):
    plain = teacher(*point)
    for guided in kinds(teacher, 1.0, mix):
        teacher.samples = 0
        assert torch.equal(guided(*point), plain)
        assert teacher.samples == 5
        assert describe(guided) == "unguided, g = 1"


@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "linear" if m is linear else str(m))
def test_every_mix_at_scale_one_would_give_x_itself(mix):
    x, negative = torch.randn(2, 5, D, dtype=torch.double)
    torch.testing.assert_close(mix(x, negative, 1.0), x)


def test_guiding_a_gaussian_moves_its_mean_in_proportion(teacher, point):
    x_t, t, cond = point
    _, sigma = teacher.process.at(t, x_t)
    shift = teacher.means[cond["class_labels"]] - teacher.means[3]
    pull = sigma**2 / (1 + sigma**2)  # how much of a mean shows in x̂
    found = Guided(teacher, 2.5, NULL)(*point)
    torch.testing.assert_close(found, teacher(*point) + 1.5 * pull * shift)


def test_a_negative_prompt_is_another_null(teacher, point):
    x_t, t, cond = point
    against = Guided(teacher, 3.0, {"class_labels": torch.tensor([2])})(*point)
    away = teacher(x_t, t, {"class_labels": torch.full((5,), 2)})
    torch.testing.assert_close(against, away + 3 * (teacher(*point) - away))
    same = cond["class_labels"] == 2
    torch.testing.assert_close(against[same], teacher(*point)[same])  # nothing to move away from


def test_projection_with_eta_one_and_no_threshold_is_classifier_free(teacher, point):
    plain, projected = (Guided(teacher, 4.0, NULL, m)(*point) for m in (linear, Projected(1.0)))
    torch.testing.assert_close(projected, plain)


def test_projection_with_eta_zero_moves_at_right_angles_to_x(teacher, point):
    x = teacher(*point)
    moved = Guided(teacher, 4.0, NULL, Projected(0.0))(*point) - x
    assert moved.norm(dim=1).min() > 1e-3
    torch.testing.assert_close((moved * x).sum(1), torch.zeros(5).double(), atol=1e-12, rtol=0)


def test_the_threshold_bounds_how_far_guidance_moves():
    x, negative = torch.randn(2, 64, D, dtype=torch.double)
    moved = (Projected(1.0, 0.5)(x, negative, 3.0) - x).norm(dim=1)
    torch.testing.assert_close(moved, torch.full((64,), 2 * 0.5).double())
    loose = Projected(1.0, 1e3)(x, negative, 3.0)
    torch.testing.assert_close(loose, linear(x, negative, 3.0))
    equal = Projected(0.0, 0.5)(x, x, 3.0)
    assert torch.equal(equal, x)  # no gap, and no division by zero


def test_rescaling_by_zero_is_nothing_and_by_one_keeps_the_conditionals_deviation(teacher, point):
    plain = Guided(teacher, 4.0, NULL)(*point)
    assert torch.equal(Guided(teacher, 4.0, NULL, Rescaled(0.0))(*point), plain)
    whole, half = (Guided(teacher, 4.0, NULL, Rescaled(f))(*point) for f in (1.0, 0.5))
    torch.testing.assert_close(whole.std(1), teacher(*point).std(1))
    torch.testing.assert_close(half, (plain + whole) / 2)


def test_an_interval_holds_its_high_end_and_not_its_low_one(teacher):
    process = Linear()
    t = torch.tensor([0.2, 0.5, 0.75, 0.75 + 1e-9, 1.0], dtype=torch.double)  # σ/α = 1/4, 1, 3, …
    guided = Interval(Guided(Conditional(teacher.means, process), 3.0, NULL), 0.25, 3.0)
    assert guided.inside(t).tolist() == [False, True, True, False, False]


def test_outside_the_interval_one_evaluation_is_spent_and_x_is_unguided(teacher, point):
    x_t, _, cond = point
    ratio = torch.tensor([0.1, 1.0, 2.0, 50.0, 0.3], dtype=torch.double)
    t, within = teacher.process.time(ratio), (ratio > 0.3001) & (ratio < 10)
    full, plain = Guided(teacher, 3.0, NULL)(x_t, t, cond), teacher(x_t, t, cond)
    limited = Interval(Guided(teacher, 3.0, NULL), 0.3001, 10)
    teacher.samples = 0
    found = limited(x_t, t, cond)
    assert teacher.samples == 2 * 2 + 3
    torch.testing.assert_close(found, torch.where(within[:, None], full, plain), rtol=0, atol=0)
    for some, cost in ((within, 4), (~within, 3)):
        teacher.samples = 0
        limited(x_t[some], t[some], {"class_labels": cond["class_labels"][some]})
        assert teacher.samples == cost


def test_an_interval_is_of_the_noise_level_under_any_clock(teacher, point):
    x_t, t, cond = point
    straight = Interval(Guided(teacher, 3.0, NULL), 0.5, 5)
    clocked = Interval(Guided(Reparametrised(teacher, Linear()), 3.0, NULL), 0.5, 5)
    ratio = teacher.process.scales(t)[1]
    own = Linear().time(ratio)
    scaled = x_t / (1 + ratio[:, None])
    torch.testing.assert_close(clocked(scaled, own, cond), straight(x_t, t, cond))


def test_autoguidance_extrapolates_from_the_weaker_network():
    strong = Gaussian(torch.ones(D).double(), torch.full((D,), 1.0).double())
    weak = Gaussian(torch.zeros(D).double(), torch.full((D,), 2.0).double())
    x_t, t = torch.randn(5, D, dtype=torch.double), torch.rand(5, dtype=torch.double)
    found = AutoGuided(strong, 2.0, weak)(x_t, t)
    torch.testing.assert_close(found, 2 * strong(x_t, t) - weak(x_t, t))


class Blocks(nn.Module):
    """Three residual blocks, one of which is told everything by name."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.pair = TwoStreams()
        self.wide = nn.Linear(D, 2 * D)

    def forward(self, x_t, t):
        x = x_t + self.first(x_t)
        text, x = self.pair(hidden_states=x, encoder_hidden_states=x[:2] * 2)
        return self.last(x) + self.wide(x)[:, :D] + text.mean()


class TwoStreams(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states):
        return encoder_hidden_states + 1, hidden_states * 3


def test_a_skipped_block_returns_its_input_and_is_itself_again_afterwards():
    net = Blocks()
    denoiser = Network(net, Linear(), "x")
    x_t, t = torch.randn(5, D), torch.rand(5)
    plain = denoiser(x_t, t)
    with torch.no_grad():
        x = x_t + net.first(x_t)
        by_hand = net.last(x) + net.wide(x)[:, :D] + 2 * x[:2].mean()  # without `pair`
    found = SkipLayerGuided(denoiser, 1.5, ["backbone.pair"])(x_t, t)
    torch.testing.assert_close(found, by_hand + 1.5 * (plain - by_hand))
    assert torch.equal(denoiser(x_t, t), plain)
    without_first = deepcopy(denoiser)
    without_first.backbone.first = nn.Identity()
    found = SkipLayerGuided(denoiser, 0.0, ["backbone.first"])(x_t, t)
    torch.testing.assert_close(found, without_first(x_t, t))


def test_a_block_that_is_not_there_or_cannot_be_skipped_is_named():
    denoiser = Network(Blocks(), Linear(), "x")
    with refused("teacher.guidance.blocks", "backbone.frist", "backbone.first"):
        SkipLayerGuided(denoiser, 2.0, ["backbone.frist"])
    with refused("teacher.guidance.blocks", "Linear"):
        SkipLayerGuided(denoiser, 2.0, ["backbone.wide"])(torch.randn(2, D), torch.rand(2))


def test_skipping_refuses_to_be_recomputed_without_its_hooks():
    denoiser = Network(Blocks(), Linear(), "x")
    denoiser.backbone.gradient_checkpointing = True
    skipping, x_t = SkipLayerGuided(denoiser, 2.0, ["backbone.first"]), torch.randn(2, D)
    skipping(x_t, torch.rand(2))
    with refused("teacher.guidance.blocks", "checkpointing"):
        skipping(x_t.requires_grad_(), torch.rand(2))


def test_cfgpp_without_strength_is_the_unconditional_walk(teacher, point):
    z, _, cond = point
    times = teacher.process.grid(6)
    none = {"class_labels": torch.full((5,), 3)}
    guided = Guided(teacher, 1.0, NULL)
    torch.testing.assert_close(
        cfgpp(guided, 80 * z, times, cond, 0.0), ddim(teacher, 80 * z, times, none)
    )
    same = cfgpp(guided, 80 * z, times, none, 0.7)  # where the condition says nothing
    torch.testing.assert_close(same, ddim(teacher, 80 * z, times, none))


def test_a_step_of_cfgpp_noises_the_guided_x_with_the_unconditional_noise(teacher, point):
    x_t, _, cond = point
    times = torch.tensor([0.8, 0.5], dtype=torch.double)
    t, s = times[:1].expand(5), times[1:].expand(5)
    x, none = teacher(x_t, t, cond), teacher(x_t, t, {"class_labels": torch.full((5,), 3)})
    sigma_t, sigma_s = teacher.process.scales(times)[1]
    x_s = none + 0.4 * (x - none) + sigma_s / sigma_t * (x_t - none)
    last, end = (teacher(x_s, s, c) for c in (cond, {"class_labels": torch.full((5,), 3)}))
    found = cfgpp(Guided(teacher, 7.0, NULL), x_t, times, cond, 0.4)
    torch.testing.assert_close(found, end + 0.4 * (last - end))
    with refused("strength", "0", "1", "7"):
        cfgpp(Guided(teacher, 7.0, NULL), x_t, times, cond, 7.0)


def test_a_guided_walk_ends_nearer_to_its_class_than_an_unguided_one(teacher):
    z, cond = torch.randn(256, D).double(), {"class_labels": torch.zeros(256).long()}
    axis = teacher.means[0] - teacher.means[3]
    ends = [solve(Guided(teacher, g, NULL), z, 12, "heun", cond).mean(0) @ axis for g in (1, 3)]
    assert ends[1] > ends[0] + axis.norm() ** 2  # two gaps further, less what the steps lose


@pytest.mark.parametrize(
    ("guidance", "line"),
    [
        ("1", "unguided, g = 1"),
        ("3", "classifier-free guidance, g = 3: 1 is none"),
        ("{scale: 2, interval: [0.2, 5]}",
         "classifier-free guidance, g = 2: 1 is none, where 0.2 < σ/α ≤ 5"),
        ("{scale: 4, kind: apg, threshold: 15, rescale: 0.5}",
         "classifier-free guidance, g = 4: 1 is none, projected with η = 0 and threshold 15, "
         "rescaled by 0.5"),
        ("{scale: 2, kind: skip, blocks: [backbone.mid_block.resnets.0]}",
         "skip-layer guidance, g = 2: 1 is none, without backbone.mid_block.resnets.0"),
        ("{scale: 2, kind: auto, weaker: digits}", "autoguidance, g = 2: 1 is none"),
    ],
)  # fmt: skip
def test_a_recipe_makes_what_it_says(tmp_path, guidance, line):
    recipe = written(tmp_path, guidance)
    assert Recipe.check(recipe.tree()) == recipe
    teacher = guided_teacher.load_teacher(recipe.teacher)
    guided = guided_teacher.guided(recipe.teacher, teacher)
    assert describe(guided) == line
    cond = teacher.codec.condition([1, 2])
    x = guided(torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.6]), cond)
    assert x.shape == (2, 1, 8, 8) and torch.isfinite(x).all()


def written(folder, guidance):
    tree = {
        "teacher": {"source": "digits", "guidance": yaml.safe_load(guidance)},
        "objective": {"name": "sid"},
        "train": {"steps": 1},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(tree))
    return Recipe.load(folder / "r.yaml")


@pytest.mark.parametrize(
    ("guidance", "line"),
    [
        ("{scal: 2}", ("teacher.guidance.scal", "scale")),
        ("{kind: cfg}", ("teacher.guidance.scale",)),
        ("{scale: -1}", ("teacher.guidance.scale", "0", "1")),
        ("strong", ("teacher.guidance", "strong")),
        ("{scale: 2, kind: cgf}", ("teacher.guidance.kind", "'cfg'", "'apg'", "skip", "auto")),
        ("{scale: 2, interval: [5, 1]}", ("teacher.guidance.interval", "5", "1")),
        ("{scale: 2, eta: 0.5}", ("teacher.guidance.eta", "'apg'")),
        ("{scale: 2, kind: skip}", ("teacher.guidance.blocks", "skip")),
        ("{scale: 2, kind: auto}", ("teacher.guidance.weaker", "auto")),
        ("{scale: 2, rescale: 2}", ("teacher.guidance.rescale", "1")),
    ],
)
def test_a_mistaken_guidance_is_one_line(tmp_path, guidance, line):
    with refused(*line):
        written(tmp_path, guidance)


def test_a_weaker_teacher_of_another_shape_is_refused(tmp_path):
    recipe = written(tmp_path, "{scale: 2, kind: auto, weaker: 'analytic:ring'}")
    with refused("teacher.guidance.weaker", "analytic:ring", "2", "1", "8"):
        guided_teacher.guided(recipe.teacher, guided_teacher.load_teacher(recipe.teacher))


@pytest.mark.parametrize(
    ("kind", "null", "reads"),  # of ten labels, the last may be the null one
    [("unconditional", None, "no condition"), ("eps", 9, "labels of 9 classes")],
)
def test_a_weaker_teacher_of_other_labels_is_refused(pipelines, tmp_path, kind, null, reads):
    recipe = written(tmp_path, f"{{scale: 2, kind: auto, weaker: '{pipelines[kind]}'}}")
    section = recipe.teacher.model_copy(update={"null_label": null})
    recipe = recipe.model_copy(update={"teacher": section})
    with refused("teacher.guidance.weaker", reads, "labels of 10 classes"):
        guided_teacher.guided(recipe.teacher, load("digits"))


def test_a_weaker_text_teacher_of_another_family_is_refused(tmp_path):
    sd, sdxl = (load(str(families.build(k, tmp_path / k))) for k in ("sd", "sdxl"))
    with refused("teacher.guidance.weaker", "sdxl", "40×64", "pooled of 32", "40×32"):
        guided_teacher.check_conditions("sdxl", sdxl, sd)
    guided_teacher.check_conditions("sd", sd, sd)


def cosine(teacher, x_t, t, cond):
    x, negative = Guided(teacher, 1.0, NULL).pair(x_t, t, cond)
    return (x * negative).sum(1) / x.norm(dim=1) / negative.norm(dim=1)


def test_a_sample_is_guided_until_its_two_predictions_agree_and_never_again(teacher, point):
    """By hand, sample by sample, on a walk whose cosines cross the threshold here and there."""
    x_t, _, cond = point
    guided, times = Guided(teacher, 3.0, NULL), teacher.process.grid(7).tolist()
    left, want, cost = [True] * 5, x_t, 0
    threshold = 0.8
    adaptive = Adaptive(guided, threshold)
    teacher.samples = 0
    found = ddim(adaptive, x_t, torch.tensor(times, dtype=torch.double), cond)
    spent, stopped = teacher.samples, []
    for step, now in enumerate(times):
        t = torch.full((5,), now, dtype=torch.double)
        both, alone = guided(want, t, cond), teacher(want, t, cond)
        x = torch.stack([b if on else a for a, b, on in zip(alone, both, left, strict=True)])
        cost += 5 + sum(left)
        near = cosine(teacher, want, t, cond)
        left = [on and c < threshold for on, c in zip(left, near.tolist(), strict=True)]
        stopped.append(5 - sum(left))
        s = torch.full_like(t, times[step + 1]) if step < 6 else None
        want = x if s is None else teacher.process.step(want, x, t, s)
    assert stopped[-2] > 0 and len(set(stopped)) > 2  # some stop, and not all at once
    torch.testing.assert_close(found, want)
    assert spent == cost


def test_whether_a_sample_stops_does_not_depend_on_its_batch(teacher, point):
    x_t, _, cond = point
    guided, times = Guided(teacher, 3.0, NULL), teacher.process.grid(7)
    together = ddim(Adaptive(guided, 0.8), x_t, times, cond)
    for i in range(5):
        one = {k: v[i : i + 1] for k, v in cond.items()}
        alone = ddim(Adaptive(guided, 0.8), x_t[i : i + 1], times, one)
        torch.testing.assert_close(together[i : i + 1], alone)


@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "linear" if m is linear else str(m))
def test_adaptive_guidance_that_never_stops_is_the_guidance_it_wraps(teacher, point, mix):
    x_t, _, cond = point
    guided, times = Guided(teacher, 3.0, NULL, mix), teacher.process.grid(5)
    found = ddim(Adaptive(guided, 2.0), x_t, times, cond)
    torch.testing.assert_close(found, ddim(guided, x_t, times, cond))


@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "linear" if m is linear else str(m))
def test_adaptive_guidance_that_stops_at_once_guides_one_call(teacher, point, mix):
    x_t, t, cond = point
    adaptive = Adaptive(Guided(teacher, 3.0, NULL, mix), -1.0)
    torch.testing.assert_close(adaptive(x_t, t, cond), adaptive.guided(x_t, t, cond))
    teacher.samples = 0
    torch.testing.assert_close(adaptive(x_t, t, cond), teacher(x_t, t, cond))
    assert teacher.samples == 10  # five of them the line above


# ---- each sample's own scale


OWN = torch.tensor([1.0, 2.5, 0.0, 4.0, 7.5], dtype=torch.double)
IDS = ["linear" if m is linear else str(m) for m in MIXES]


def with_scales(cond, scales):
    return {**cond, "guidance_scale": scales}


def row(value, i):
    """One sample of a tensor or a condition."""
    if isinstance(value, dict):
        return {k: v[i : i + 1] for k, v in value.items()}
    return value[i : i + 1]


@pytest.mark.parametrize("mix", MIXES, ids=IDS)
def test_samples_of_their_own_scales_are_as_many_calls_of_one_scale(teacher, point, mix):
    for i, guided in enumerate(kinds(teacher, 3.0, mix)):
        together = guided(*point[:2], with_scales(point[2], OWN))
        for j, scale in enumerate(OWN.tolist()):
            alone = kinds(teacher, scale, mix)[i](*(row(v, j) for v in point))
            torch.testing.assert_close(together[j : j + 1], alone)


@pytest.mark.parametrize("mix", MIXES, ids=IDS)
def test_equal_scales_are_the_one_scale_and_ones_are_unguided(teacher, point, mix):
    for guided in kinds(teacher, 3.0, mix):
        for dtype in (torch.float32, torch.float64):
            same = with_scales(point[2], torch.full((5,), 3.0, dtype=dtype))
            torch.testing.assert_close(guided(*point[:2], same), guided(*point), rtol=0, atol=1e-12)
        ones = with_scales(point[2], torch.ones(5))
        assert torch.equal(guided(*point[:2], ones), teacher(*point))


@pytest.mark.parametrize("mix", MIXES, ids=IDS)
def test_in_single_precision_equal_scales_are_the_one_scale_bit_for_bit(mix):
    x, negative = torch.randn(2, 64, 3, 8, 8)
    found = mix(x, negative, torch.full((64,), 2.7))
    assert found.dtype == torch.float32
    assert torch.equal(found, mix(x, negative, 2.7))


def test_the_conditions_scale_stands_in_for_the_guidances_own(teacher, point):
    """Also for one of 1, which then guides."""
    x_t, t, cond = point
    found = Guided(teacher, 1.0, NULL)(x_t, t, with_scales(cond, torch.full((5,), 3.0)))
    torch.testing.assert_close(found, Guided(teacher, 3.0, NULL)(*point))


def test_outside_an_interval_scales_do_nothing(teacher, point):
    x_t, t, cond = point
    limited = Interval(Guided(teacher, 3.0, NULL), 1e6, 1e7)
    assert torch.equal(limited(x_t, t, with_scales(cond, OWN)), teacher(*point))


def test_adaptive_guidance_and_solvers_follow_each_samples_scale(teacher, point):
    x_t, _, cond = point
    times, own = teacher.process.grid(7), with_scales(cond, OWN)
    together = ddim(Adaptive(Guided(teacher, 3.0, NULL), 0.8), x_t, times, own)
    for i, scale in enumerate(OWN.tolist()):
        alone = Adaptive(Guided(teacher, scale, NULL), 0.8)
        torch.testing.assert_close(row(together, i), ddim(alone, row(x_t, i), times, row(cond, i)))
    guided = Guided(teacher, 3.0, NULL)
    torch.testing.assert_close(cfgpp(guided, x_t, times, own), cfgpp(guided, x_t, times, cond))


def test_gradients_reach_the_scales(teacher, point):
    x_t, t, cond = point
    scales = OWN[1:].clone().requires_grad_()
    labels = {"class_labels": cond["class_labels"][1:]}
    x = Guided(teacher, 3.0, NULL)(x_t[1:], t[1:], with_scales(labels, scales))
    x.square().sum().backward()
    assert scales.grad is not None and scales.grad.abs().min() > 0


@torch.no_grad()
@pytest.mark.parametrize("mix", MIXES, ids=IDS)
def test_a_networks_skipped_layers_guide_each_sample_by_its_own_scale(mix):
    teacher = load("digits")
    x_t, t = torch.randn(4, *teacher.shape), torch.tensor([0.2, 0.4, 0.6, 0.8])
    cond, scales = teacher.codec.condition([1, 2, 3, 4]), [1.0, 2.0, 3.5, 0.5]
    block = ["backbone.mid_block.resnets.0"]
    guided = SkipLayerGuided(teacher.denoiser, 2.0, block, mix)
    together = guided(x_t, t, with_scales(cond, torch.tensor(scales)))
    for i, scale in enumerate(scales):
        alone = SkipLayerGuided(teacher.denoiser, scale, block, mix)
        torch.testing.assert_close(
            row(together, i), alone(row(x_t, i), row(t, i), row(cond, i)), atol=1e-5, rtol=1e-4
        )


def test_a_network_without_labels_is_autoguided_by_each_samples_scale():
    """Its condition holds the scale alone, and the two networks get none."""
    strong = Gaussian(torch.ones(D).double(), torch.full((D,), 1.0).double())
    weak = Gaussian(torch.zeros(D).double(), torch.full((D,), 2.0).double())
    x_t, t = torch.randn(5, D, dtype=torch.double), torch.rand(5, dtype=torch.double)
    found = AutoGuided(strong, 2.0, weak)(x_t, t, {"guidance_scale": OWN})
    expected = weak(x_t, t) + OWN[:, None] * (strong(x_t, t) - weak(x_t, t))
    torch.testing.assert_close(found, expected)
