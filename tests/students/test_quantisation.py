"""Networks in few bits: rounding, what calibration sees, the best bits, and exports."""

import copy
import itertools
import json
import random
from functools import partial

import pytest
import torch
from torch import nn

from distill.config.recipe import Recipe
from distill.planning import quantise as planning
from distill.publish.card import draft
from distill.training.networks import build_networks
from eval import shapes
from students.architecture.knapsack import GRAIN, choices
from students.export import folder as folders
from students.export.forms import form_of
from students.quantisation import choice
from students.quantisation.layers import Bits, Layer, bake, calibrated, forward_of, in_bits, layers
from students.quantisation.rounding import rounded_activation, rounded_weight, straight_through
from students.quantisation.training import RoundedConv, RoundedLinear, with_rounded_weights
from students.schedulers import student as student_of
from teachers import load
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree

PROMPTS = shapes.all_captions()[::90]


@pytest.fixture(scope="module")
def text():
    """A one-step student of the embedded text teacher, and how it is sampled."""
    teacher = load("shapes")
    student = student_of(teacher).eval().requires_grad_(False)
    return teacher, student, lambda: folders.sample_student(student, teacher, PROMPTS, 0)


@pytest.fixture
def whole(text):
    teacher, student, sample = text
    found = calibrated(student.denoiser.backbone, sample)
    return choice.Whole(student.denoiser.backbone, found, sample, teacher.codec.decode)


# rounding


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_on_a_symmetric_grid_of_their_output(bits):
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(bits))
    made = rounded_weight(weight, bits)
    largest = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True) / largest
    steps = made / scale
    assert torch.allclose(steps, steps.round(), atol=1e-4) and steps.abs().max() <= largest + 1e-4
    assert (made - weight).abs().le(scale / 2 + 1e-6).all()
    assert torch.allclose(made.abs().amax(1), weight.abs().amax(1))  # the extremes stay
    assert torch.allclose(rounded_weight(made, bits), made, atol=1e-6)  # once is enough
    assert torch.allclose(rounded_weight(-weight, bits), -made)


def test_sixteen_bits_are_the_identity():
    x = torch.randn(3, 7)
    assert rounded_weight(x, 16) is x and rounded_activation(x, 16, [(-1, 1)]) is x


@pytest.mark.parametrize("bits", [6, 8])
def test_the_error_of_an_even_variable_is_a_twelfth_of_a_squared_step(bits):
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(400_000, generator=rng, dtype=torch.float64) * 5 - 2
    step = 5 / (2**bits - 1)
    error = (rounded_activation(x, bits, [(-2.0, 3.0)]) - x).square().mean().item()
    assert error == pytest.approx(step**2 / 12, rel=0.01)
    step = 2 / (2 ** (bits - 1) - 1) * 1.0
    weight = torch.rand(1, 400_000, generator=rng, dtype=torch.float64) * 4 - 2
    error = (rounded_weight(weight, bits) - weight).square().mean().item()
    assert error == pytest.approx(step**2 / 12, rel=0.01)


def test_an_activations_range_holds_zero_exactly_and_clamps():
    x = torch.tensor([-9.0, 0.0, 1.0, 9.0])
    made = rounded_activation(x, 4, [(-1.0, 2.0)])
    assert made[1] == 0 and made.tolist() == pytest.approx([-1.0, 0.0, 1.0, 2.0])
    assert rounded_activation(x[1:], 8, [(0.5, 9.0)])[0] == 0  # a range above 0 is widened to it


def test_gradients_pass_straight_through():
    weight = torch.randn(3, 4, requires_grad=True)
    out = straight_through(weight, 3)
    assert torch.equal(out, rounded_weight(weight, 3).detach()) or torch.allclose(
        out, rounded_weight(weight, 3), atol=1e-7
    )
    grad = torch.randn(3, 4)
    out.backward(grad)
    assert torch.equal(weight.grad, grad)


def test_splitting_helps_where_the_halves_differ_by_ten():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(8, 12, 5, 5, generator=rng)
    x[:, 6:] *= 10
    conv = nn.Conv2d(12, 4, 1)
    with torch.no_grad():
        conv.weight[:, :6] *= 10  # both halves matter alike, as a trained shortcut's do
    ranges = [(v.min().item(), v.max().item()) for v in (x[:, :6], x[:, 6:])]
    one = [(min(r[0] for r in ranges), max(r[1] for r in ranges))]
    errors = {}
    for split, r in ((6, ranges), (0, one)):
        layer = Layer(conv, "conv_shortcut", 48, split, None, r)
        with torch.no_grad():
            made = forward_of(layer, Bits(6, 6), True)(x)
            errors[split] = (made - conv(x)).square().mean().item()
    assert errors[6] < errors[0] / 5


# what calibration sees


def test_the_layers_of_the_text_teacher_and_their_halves(text, whole):
    _, student, _ = text
    backbone = student.denoiser.backbone
    assert [*whole.layers] == [*layers(backbone)] and len(whole.layers) == 83
    total = sum(v.weights for v in whole.layers.values())
    assert 0.98 < total / sum(p.numel() for p in backbone.parameters()) < 1
    splits = {n: v.split for n, v in whole.layers.items() if v.split}
    assert splits == {
        "up_blocks.0.resnets.0.conv_shortcut": 96, "up_blocks.0.resnets.1.conv_shortcut": 96,
        "up_blocks.1.resnets.0.conv_shortcut": 96, "up_blocks.1.resnets.1.conv_shortcut": 48,
    }  # fmt: skip
    assert all(len(v.ranges) == 1 + bool(v.split) for v in whole.layers.values())
    content = [n for n, v in whole.layers.items() if v.content]
    assert len(content) == 24 and not [n for n in content if "attn1" in n or "resnets" in n]


def test_the_first_token_is_the_same_for_every_prompt_of_a_causal_encoder(text, whole):
    teacher, _, _ = text
    same = [n for n, v in whole.layers.items() if v.first is not None]
    assert len(same) == 8 and all(n.endswith(("attn2.to_k", "attn2.to_v")) for n in same)
    (tokens,) = teacher.codec.condition(["", "a red circle"]).values()
    assert torch.allclose(whole.layers[same[0]].first[0], tokens[1, :1], atol=1e-6)


def test_a_first_token_that_differs_between_prompts_is_rounded_as_the_others():
    net = nn.Module()
    net.attn2 = nn.Module()
    net.attn2.to_k = nn.Linear(4, 4)
    rows = torch.randn(2, 3, 4)
    (layer,) = calibrated(net, lambda: net.attn2.to_k(rows)).values()
    assert layer.first is None
    assert layer.ranges == [(rows.min().item(), rows.max().item())]
    rows[:, 0] = 50  # an outlier, the same for both
    (layer,) = calibrated(net, lambda: net.attn2.to_k(rows)).values()
    assert layer.first is not None and layer.ranges[0][1] == rows[:, 1:].max().item()
    with torch.no_grad():
        whole = net.attn2.to_k(rows)
        kept, rounded = (forward_of(layer, Bits(8, 8), v)(rows) for v in (True, False))
    assert torch.allclose(kept[:, 0], whole[:, 0], rtol=1e-6)
    error = [(v[:, 1:] - whole[:, 1:]).square().mean() for v in (kept, rounded)]
    assert error[0] < error[1] / 20  # without it the outlier takes the levels


def test_in_full_precision_the_first_token_changes_nothing(whole):
    x = whole.sample()
    assert torch.equal(whole.rounded(dict.fromkeys(whole.layers, Bits())), x)
    forwards = {n: Bits(weights=16, activations=16) for n in whole.layers}
    for first in (True, False):
        with in_bits(whole.layers, forwards, first):
            assert torch.equal(whole.sample(), x)
    layer = next(v for v in whole.layers.values() if v.first is not None)
    tokens = torch.cat([layer.first, torch.randn(1, 3, layer.first.shape[-1])], 1)
    made = [forward_of(layer, Bits(), first)(tokens) for first in (True, False)]
    assert torch.allclose(*made, atol=1e-6) and torch.allclose(made[0], layer.module(tokens))


def test_errors_fall_with_bits_and_nothing_stays_rounded(whole):
    x = whole.sample()
    ratios = [choice.sqnr(x, whole.rounded(dict.fromkeys(whole.layers, Bits(weights=b))))
              for b in (2, 4, 8)]  # fmt: skip
    assert ratios[0] + 8 < ratios[1] < ratios[2] - 12  # 24 dB for 4 bits, where errors are small
    assert torch.equal(whole.sample(), x)


# the best bits


@pytest.mark.parametrize("seed", range(20))
def test_choices_are_the_best_of_all(seed):
    rng = random.Random(seed)
    names = [f"l{i}" for i in range(5)]
    weights = {n: rng.randint(1, 50) for n in names}
    value = {n: {b: rng.random() * b for b in (2, 4, 8)} for n in names}
    size = {n: {b: b * weights[n] for b in (2, 4, 8)} for n in names}
    most = int(rng.uniform(2, 8) * sum(weights.values()))
    assert most < GRAIN  # so that nothing is rounded
    every = itertools.product((2, 4, 8), repeat=5)
    fits = [c for c in every if sum(size[n][b] for n, b in zip(names, c, strict=True)) <= most]
    best = max(sum(value[n][b] for n, b in zip(names, c, strict=True)) for c in fits)
    found = choices(value, size, most)
    assert sum(size[n][b] for n, b in found.items()) <= most
    assert sum(value[n][b] for n, b in found.items()) == pytest.approx(best)


def test_large_sizes_are_never_too_large_and_too_little_is_refused():
    rng = random.Random(0)
    weights = {f"l{i}": rng.randint(10**5, 10**7) for i in range(40)}
    size = {n: {b: b * w for b in (2, 4, 8)} for n, w in weights.items()}
    value = {n: {2: 1.0, 4: 2.0 + rng.random(), 8: 3.0} for n in weights}
    for mean in (2, 3, 5, 8):
        most = mean * sum(weights.values())
        used = sum(size[n][b] for n, b in choices(value, size, most).items())
        assert 0.9 * most * (mean != 2) <= used <= most
    with pytest.raises(ValueError, match="larger"):
        choices(value, size, 2 * sum(weights.values()) - 1)


def test_a_mean_is_kept_by_every_division_and_the_even_one_comes_first(whole):
    rng = random.Random(0)
    kept = {n: {2: rng.random(), 4: 1 + rng.random(), 8: 2.5} for n in whole.layers}
    total = sum(v.weights for v in whole.layers.values())
    found = [*choice.divided(kept, whole.layers, 4)]
    assert set(found[0].values()) == {4} and len(found) > 2
    for bits in found:
        assert bits.keys() == whole.layers.keys()
        mean = sum(whole.layers[n].weights * b for n, b in bits.items()) / total
        assert 3.9 < mean <= 4
    assert choice.best(whole, iter([dict.fromkeys(kept, b) for b in (2, 8, 4)])) == dict.fromkeys(
        kept, 8
    )


def test_a_programme_sums_powers_of_errors_and_similarities():
    assert choice.worth({2: 10.0, 4: 20.0}, False) == pytest.approx({2: -0.1, 4: -0.01})
    assert choice.worth({2: 0.5, 4: 0.9}, True) == {2: 0.5, 4: 0.9}
    # a large layer and small ones whose ratios gain more dB, for less power
    sizes = {"large": 8, **{f"s{i}": 1 for i in range(8)}}
    found = {n: Layer(None, n, v) for n, v in sizes.items()}
    kept = {n: {2: 5.0, 4: 20.0, 8: 44.0} if n == "large" else {2: 20.0, 4: 40.0, 8: 64.0}
            for n in sizes}  # fmt: skip
    chosen = [*choice.divided(kept, found, 4)][-1]
    assert chosen["large"] == 4 and min(chosen.values()) == 4


def test_ratios_have_their_closed_forms():
    x = torch.randn(4, 3, 16, 16)
    assert choice.sqnr(x, 0.9 * x) == pytest.approx(20, abs=1e-4)
    assert choice.ssim(x, x) == pytest.approx(1, abs=1e-6)
    flat, other = torch.full((1, 1, 8, 8), 0.5), torch.full((1, 1, 8, 8), 0.1)
    wanted = (2 * 0.5 * 0.1 + 4e-4) / (0.5**2 + 0.1**2 + 4e-4)  # means alone
    assert choice.ssim(flat, other) == pytest.approx(wanted, rel=1e-4)
    other = torch.randn_like(x)
    assert choice.ssim(x, other) < 0.3 < 0.7 < choice.ssim(x, x + 0.3 * other) < 1


def test_layers_of_content_are_judged_by_pictures(whole):
    names = ["conv_in", next(n for n, v in whole.layers.items() if v.content)]
    few = choice.Whole(whole.backbone, {n: whole.layers[n] for n in names}, *[
        whole.sample, whole.decode])  # fmt: skip
    (first, of_first, ratio), (second, of_second, _) = choice.sensitivities(few, (2, 8), 8)
    assert [first, second] == names and ratio > 20
    assert of_first[2] + 10 < of_first[8] and of_first[8] > 30  # dB
    assert of_second[2] < of_second[8] <= 1  # a similarity


# exports


def test_a_folder_of_few_bits_is_a_stock_one(tmp_path, text):
    """`save` compares its pictures with ours in a process of its own."""
    teacher, student, _ = text
    folders.export(student, teacher, tmp_path / "student", {"eval": {}})
    request = planning.Request(bits=4, activations=8, keep_share=0.03, prompts=("a", "b"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "chosen", even)  # the search takes long, and is tested above
        made = planning.quantise(tmp_path / "student", tmp_path / "few", request)
    assert made.mean_bits == 4 and not made.figures
    assert made.agreement["weights"]["sqnr"] > 5 and "and inputs" in made.agreement
    again, _ = folders.load_student(tmp_path / "few")
    before = student.denoiser.backbone.state_dict()
    for name, value in again.denoiser.backbone.state_dict().items():
        module = name.removesuffix(".weight")
        if module in made.bits and name.endswith(".weight"):
            split = layers(again.denoiser.backbone)[module].split
            assert torch.allclose(value, rounded_weight(before[name], 4, split), atol=1e-7), name
        else:
            assert torch.equal(value, before[name])
    about = json.loads((tmp_path / "few" / planning.QUANTISED).read_text())
    assert about["bits"]["conv_in"] == {"weights": 4, "activations": 8}
    assert len(about["splits"]) == 4 and len(about["first_token"]) == 8
    assert "4 bits" in (tmp_path / "few" / "README.md").read_text()
    assert not (tmp_path / "few" / "student").exists() and len([*tmp_path.iterdir()]) == 2


def even(whole, request):
    return dict.fromkeys(whole.layers, Bits(int(request.bits), request.activations)), {}


def test_baked_weights_are_what_was_simulated(whole):
    bits = dict.fromkeys(whole.layers, Bits(weights=4))
    with in_bits(whole.layers, bits, first_token=False):
        made = whole.sample()
    before = {n: v.module.weight.clone() for n, v in whole.layers.items()}
    bake(whole.layers, bits)
    try:
        assert torch.equal(whole.sample(), made)
    finally:
        with torch.no_grad():
            for n, v in whole.layers.items():
                v.module.weight.copy_(before[n])


@pytest.mark.parametrize(
    ("request_of", "words"),
    [
        ({"bits": 1}, ["--bits", "1", "2 to 8"]),
        ({"bits": 9}, ["--bits", "9"]),
        ({"bits": 16}, ["--bits", "16", "nothing"]),
        ({"activations": 3}, ["--activation-bits", "3", "4 to 8"]),
        ({"keep_share": 1}, ["--keep-share", "1"]),
    ],
)
def test_what_cannot_be_is_refused(request_of, words):
    with refused(*words):
        planning.Request(**request_of).check()


# students that are trained through their rounding


def rounded_recipe(**changes):
    tree = {**recipe_tree("sid", "shapes"), "student": {"format": {"weights": 4}}}
    return Recipe.check({**tree, **changes})


def test_a_student_learns_through_its_rounding_and_leaves_with_it(tmp_path):
    teacher = load("shapes")
    student = build_networks(rounded_recipe(), teacher)["student"]
    backbone = student.denoiser.backbone
    plain = load("shapes").denoiser.backbone
    assert backbone.state_dict().keys() == plain.state_dict().keys()
    x_t, t = torch.randn(2, *teacher.shape), torch.full((2,), 0.9)
    cond = teacher.codec.condition(["a red circle", "two blue squares"])
    out = student.denoiser(x_t, t, cond)
    twin = copy.deepcopy(student)
    for name, layer in layers(load("shapes").denoiser.backbone).items():
        module = twin.denoiser.backbone.get_submodule(name)
        assert (module.bits, module.split) == (4, layer.split)
        with torch.no_grad():
            module.weight.copy_(rounded_weight(module.weight, 4, layer.split))
        module.forward = partial(type(layer.module).forward, module)
    reference = twin.denoiser(x_t, t, cond)  # of plain layers with rounded weights
    assert torch.allclose(out, reference, atol=1e-5)
    out.sum().backward()
    reference.sum().backward()
    pairs = zip(student.parameters(), twin.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-3, rtol=1e-3) for a, b in pairs
               if a.grad is not None)  # fmt: skip
    left = with_rounded_weights(student)
    assert torch.allclose(left.denoiser(x_t, t, cond), out, atol=1e-5)
    assert {type(m) for m in left.modules()} & {RoundedLinear, RoundedConv} == set()
    assert type(student.denoiser.backbone.conv_in) is RoundedConv  # the trained one goes on
    assert with_rounded_weights(left) is left


@pytest.mark.slow
def test_a_run_through_rounding_leaves_a_stock_folder_of_rounded_weights(tmp_path):
    """A training, and an export that a process of its own loads."""
    recipe = rounded_recipe()
    teacher = load("shapes")
    student = build_networks(recipe, teacher)["student"]
    form_of(teacher).export(student, tmp_path / "student", recipe.tree())
    again, _ = folders.load_student(tmp_path / "student")
    for layer in layers(again.denoiser.backbone).values():
        weight = layer.module.weight.detach()
        assert torch.allclose(rounded_weight(weight, 4, layer.split), weight, atol=1e-6)
    assert "through 4 bits" in draft(tmp_path / "student")


@pytest.mark.parametrize(
    ("student", "more", "key"),
    [
        ({"format": {"weights": 1}}, {}, "student.format.weights"),
        ({"format": {"weights": 9}}, {}, "student.format.weights"),
        ({"format": {}}, {}, "student.format.weights"),
        ({"format": {"weights": 4}}, {"adapters": {}}, "student.format"),
        ({"format": {"weights": 4}}, {"objective": {"name": "diffusion"}},
         "student.format"),
    ],
)  # fmt: skip
def test_formats_that_do_not_go_together_are_refused(student, more, key):
    with refused(f"*{key}"):
        rounded_recipe(student=student, **more)
