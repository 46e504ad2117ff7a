"""Layers that run twice, and the choice of layers by what they save: SnapFusion's changes."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from distill.planning.compress import savings
from eval import shapes
from students.architecture import score
from students.architecture.change import changed
from students.architecture.knapsack import cheapest
from students.architecture.score import calibration, chosen, evolved, highest, lowest, scored
from students.architecture.units import size_of, skipping, units
from students.export import folder as folders
from students.lora import network_of
from students.schedulers import source_of
from students.schedulers import student as student_of
from teachers import load
from teachers.errors import UserError
from teachers.reduced.network import CHANGED
from teachers.reduced.repeated import Repeated
from tests.students.test_architecture import MIDDLE, inputs, smaller

ATTENTION, RESNET = "up_blocks.1.attentions.1", "down_blocks.0.resnets.0"


def repeated(network, forms):
    made = changed(network.backbone, {}, {}, [], change=forms)
    return made, network.twin(made.eval(), network.schedule)


@pytest.mark.parametrize(
    ("source", "names"),
    [("shapes", [ATTENTION, RESNET]), ("digits", ["mid_block.attentions.0", MIDDLE[0]])],
)
def test_a_repeated_layer_begins_as_the_layer(source, names):
    loaded = load(source)
    network = source_of(loaded)
    forms = {name: {"kind": "repeat", "times": 3} for name in names}
    made, twin = repeated(network, forms)
    x_t, t, cond = inputs(loaded)
    with torch.no_grad():
        assert torch.equal(twin(x_t, t, cond), network(x_t, t, cond))
        made.get_submodule(names[0])[1].apply(lambda m: noisy(m))
        moved = twin(x_t, t, cond)
    assert not torch.equal(moved, network(x_t, t, cond))
    more = sum(size_of(network.backbone.get_submodule(n)) for n in names)
    assert size_of(made) - size_of(network.backbone) == 2 * more


def noisy(module):
    for p in module.parameters(recurse=False):
        torch.nn.init.normal_(p, std=0.1)


def test_a_repeated_layer_is_its_copies_one_after_another():
    layers = [torch.nn.Linear(3, 3) for _ in range(3)]
    x = torch.randn(2, 3)
    assert torch.equal(Repeated(*layers)(x), layers[2](layers[1](layers[0](x))))


def test_all_copies_learn_even_if_they_begin_as_zero():
    network = source_of(load("shapes"))
    made, twin = repeated(network, {ATTENTION: {"kind": "repeat"}})
    made.requires_grad_(True)
    x_t, t, cond = inputs(load("shapes"))
    twin(x_t, t, cond).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in made.get_submodule(f"{ATTENTION}.1.proj_out")
               .parameters())  # fmt: skip


def test_a_repeated_layer_is_one_unit_that_can_go_or_be_repeated_once_more():
    network = source_of(load("shapes"))
    made, _ = repeated(network, {ATTENTION: {"kind": "repeat"}})
    assert [*units(made)] == [*units(network.backbone)]
    more = changed(made, {}, {}, [], change={ATTENTION: {"kind": "repeat", "times": 3}})
    assert len(more.get_submodule(ATTENTION)) == 3
    assert more.config[CHANGED] == {ATTENTION: {"kind": "repeat", "times": 3}}
    gone = changed(more, {}, {}, [ATTENTION])
    assert size_of(gone) == size_of(network.backbone) - 53_232 and not gone.config[CHANGED]


def test_a_repeated_network_leaves_as_a_folder(tmp_path):
    inner = f"{ATTENTION}.1.transformer_blocks.0.attn1"
    forms = {inner: {"kind": "heads", "keep": [0, 1]}, ATTENTION: {"kind": "repeat"}}
    teacher = load("shapes")
    recipe, network = smaller("shapes", architecture={"change": forms}), source_of(teacher)
    made, twin = repeated(network, recipe.student.architecture.change)
    made.get_submodule(ATTENTION)[1].apply(noisy)
    teacher = replace(teacher, denoiser=twin)
    folders.export(student_of(teacher), teacher, tmp_path / "student", recipe.tree())
    generator, _ = folders.load_student(tmp_path / "student")
    again = network_of(generator.denoiser).backbone
    assert len(again.get_submodule(ATTENTION)) == 2
    assert again.get_submodule(inner).heads == 2
    ours, theirs = (m.get_submodule(ATTENTION).state_dict() for m in (made, again))
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (ATTENTION, {"times": 1}, "times: give more than 1"),
        (ATTENTION, {"times": True}, "times: give more than 1"),
        (ATTENTION, {"often": 2}, "has times"),
        ("up_blocks.1.resnets.0", {}, "adds nothing to its own input"),
        ("conv_in", {}, "adds nothing to its own input"),
    ],
)
def test_what_cannot_be_repeated_is_refused(name, settings, words):
    with pytest.raises(UserError, match=words) as error:
        repeated(source_of(load("shapes")), {name: {"kind": "repeat", **settings}})
    assert error.value.key == f"student.architecture.change.{name}"


def test_a_layer_with_another_form_inside_is_not_repeated_afterwards():
    inner = {f"{ATTENTION}.transformer_blocks.0.attn1": {"kind": "heads", "keep": [0]}}
    once = changed(source_of(load("shapes")).backbone, {}, {}, [], change=inner)
    with pytest.raises(UserError, match="change the outer layer first"):
        changed(once, {}, {}, [], change={ATTENTION: {"kind": "repeat"}})


# the choice


@pytest.fixture(scope="module")
def text():
    teacher = load("shapes")
    states = calibration(teacher, shapes.all_captions()[::48][:16])
    return teacher, states, scored(teacher, states)


@pytest.mark.parametrize("seed", range(10))
def test_the_choice_by_time_is_the_best_of_all_sets(seed):
    rng = random.Random(seed)
    scores = [score.Unit(f"u{i}", rng.randint(1, 99), rng.random()) for i in range(7)]
    taken = {u.name: rng.randint(10_000, 9_000_000) for u in scores}
    total = 2 * sum(taken.values())
    for again in ([], highest(scores, taken, 1)):
        keep = rng.uniform(0.75, 0.95)
        left = [u for u in scores if u.name not in again]
        added = sum(taken[n] for n in again)
        fits = [c for k in range(8) for c in itertools.combinations(left, k)
                if total + added - sum(taken[u.name] for u in c) <= keep * total]  # fmt: skip
        found = chosen(scores, total, keep, taken, again)
        saved = sum(taken[n] for n in found)
        assert total + added - saved <= keep * total and not {*found} & {*again}
        cost = {u.name: u.cost for u in scores}
        best = min(sum(u.cost for u in c) for c in fits)
        assert sum(cost[n] for n in found) == pytest.approx(best, rel=0.02)


def test_worth_is_cost_over_what_is_saved():
    scores = [score.Unit("a", 1, 0.2), score.Unit("b", 1, 0.3), score.Unit("c", 1, 0.1)]
    saves = {"a": 10, "b": 30, "c": 1}
    assert lowest({u.name: u.cost for u in scores}, saves) == "b"
    assert highest(scores, saves, 2) == ["c", "a"]


def test_layers_go_one_by_one_each_measured_without_those_before(monkeypatch):
    """By hand: u1 and u2 stand in for each other, so that after u1 the turn is u3's."""
    cost = {"u1": 1.0, "u2": 1.2, "u3": 2.0}
    joint = {("u1",): 1.0, ("u1", "u2"): 9.0, ("u1", "u3"): 3.0, ("u1", "u3", "u2"): 11.0}
    monkeypatch.setattr(score, "cost_without", lambda _, names, *rest: joint[tuple(names)])
    monkeypatch.setattr(score, "outputs", lambda *_: None)
    even = dict.fromkeys(cost, 1)
    assert evolved(None, None, cost, even, 2) == ["u1", "u3"]
    assert cheapest(cost, even, 2) == ["u1", "u2"]
    assert evolved(None, None, cost, even, 0) == []
    with pytest.raises(ValueError, match="smaller"):
        evolved(None, None, cost, even, 4)


@pytest.mark.parametrize(
    ("by", "evolve"),
    [("weights", False), ("work", False), ("time", False), ("work", True)],
)
def test_every_choice_finds_the_two_nearly_free_layers(text, by, evolve):
    """One by one by time it may be the middle's attention instead of the second of them."""
    teacher, states, scores = text
    total, saves = savings(teacher, scores, by)
    assert all(0 < saves[u.name] < total for u in scores)
    cost = {u.name: u.cost for u in scores}
    least = int(0.95 * (saves[MIDDLE[0]] + saves[MIDDLE[1]]))  # sizes are rounded
    pick = (lambda *v: evolved(source_of(teacher), states, *v)) if evolve else cheapest
    assert sorted(pick(cost, saves, least)) == MIDDLE


def test_what_a_layer_saves_is_what_a_call_without_it_saves(text):
    teacher, _, scores = text
    network = source_of(teacher)
    total, saves = savings(teacher, scores, "work")
    whole, weights = savings(teacher, scores, "weights")
    assert whole == size_of(network.backbone) and weights[MIDDLE[0]] == 184_992
    resnet = 2 * 2 * (4 * 4) * 96 * 96 * 9 + 2 * 192 * 96  # two convolutions, and the time's
    assert saves[MIDDLE[0]] == resnet and 0.05 < resnet / total < 0.07
    with skipping(network.backbone, MIDDLE[:1]):
        assert savings(teacher, [], "work")[0] == total - resnet
