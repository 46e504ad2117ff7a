"""EcoDiff: gates on heads and neurons, their law, the loss through a chain, and what is cut."""

import json

import pytest
import torch
import yaml

from distill.config.recipe import Recipe
from distill.objectives.base import Batch
from distill.objectives.smaller import ecodiff
from distill.objectives.smaller.ecodiff import EcoDiff, WidthGates
from distill.planning import compress
from distill.pretrain.pixels import teach
from students.architecture.change import changed
from students.architecture.gates import narrowed
from students.architecture.units import widths
from students.export import folder as folders
from students.generator import Generator
from students.schedulers import source_of
from students.schedulers import student as student_of
from teachers import load
from teachers.denoiser import Guided
from tests.helpers.refusals import refused

CHAIN = {"times": (1.0, 0.6), "renoise": True}


@pytest.fixture(scope="module")
def shapes():
    return load("shapes")


def made(teacher, guidance=1.0, **keys):
    network = source_of(teacher).requires_grad_(False)
    return EcoDiff(
        teacher=Guided(network, guidance, teacher.codec.null), student=Generator(network),
        gates=WidthGates.for_objective(teacher), **keys,
    )  # fmt: skip


def batch_of(teacher, n=3):
    torch.manual_seed(0)
    prompts = [*range(n)] if teacher.codec.classes else ["a red circle", "two blue squares"] * n
    return Batch(None, torch.randn(n, *teacher.shape), teacher.codec.condition(prompts[:n]))


def closed(backbone, change):
    """Gates for `narrowed`: 0 for the heads and neurons that a change does not keep."""
    known, found = widths(backbone), {}
    for name, form in change.items():
        found[known[name].out] = torch.zeros(1, known[name].count)
        found[known[name].out][0, form["keep"]] = 1
    return found


def lambdas(gates, value):
    with torch.no_grad():
        gates.weights.copy_(torch.as_tensor(value).expand_as(gates.weights))


# the law of a gate


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.88), (3.0, 0.993), (-2.0, 0.4975)])
def test_how_often_a_gate_is_open(shapes, value, expected):
    gates = WidthGates.for_objective(shapes)
    lambdas(gates, value)
    assert gates.open()[0].item() == pytest.approx(expected, abs=5e-4)
    torch.manual_seed(0)
    drawn = ecodiff.gates(torch.rand(200_000, 1), torch.tensor([value]))
    assert (drawn > 0).float().mean().item() == pytest.approx(expected, abs=4e-3)
    assert drawn.min() >= 0 and drawn.max() <= 1 and len(drawn.unique()) > 1000


def test_the_penalty_is_the_expected_number_of_open_gates(shapes):
    """Against draws, of gates that all differ; and its mean over layers, by hand."""
    gates = WidthGates.for_objective(shapes)
    torch.manual_seed(0)
    lambdas(gates, torch.randn_like(gates.weights) * 2 - 1)
    u = torch.rand(4000, len(gates.weights))
    counted = (ecodiff.gates(u, gates.weights) > 0).float().sum(1)
    error = (counted.mean() - gates.open().sum()).abs()
    assert error < 4 * counted.std() / 4000**0.5
    parts = gates.split(gates.open())
    assert [len(v) for v in parts.values()] == [w.count for w in gates.layers.values()]
    by_hand = sum(v.sum() / len(v) for v in parts.values()) / len(parts)
    torch.testing.assert_close(gates.mean(gates.open()), by_hand)


# the loss


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_open_gates_move_nothing_and_all_of_the_loss_is_the_penalty(shapes, guidance):
    objective = made(shapes, guidance, **CHAIN, sparsity=0.25)
    lambdas(objective.gates, 1e4)
    (turn,) = objective.turns(0)
    assert turn.players == ("gates",)
    loss = turn.loss(batch_of(shapes))
    assert loss.logs["distance"] == 0 and loss.logs["open"] == 1
    torch.testing.assert_close(loss.value.detach(), torch.tensor(0.25))
    lasso = made(shapes, **CHAIN, sparsity=0.5, penalty="l1", first=4.0)
    lasso_loss = lasso.gates_loss(batch_of(shapes))
    torch.testing.assert_close(lasso_loss.value.detach() - lasso_loss.logs["distance"],
                               torch.tensor(2.0))  # fmt: skip


@pytest.mark.parametrize("renoise", [True, False])
def test_the_gradient_through_two_steps_is_the_difference_quotient(shapes, renoise):
    """With u and the noise of the second step fixed, along a random direction, in float64."""
    objective = made(shapes, times=(1.0, 0.6), renoise=renoise, first=1.0)
    network = source_of(shapes)
    batch, gates = batch_of(shapes), objective.gates
    try:
        network.double(), gates.double()
        batch = Batch(None, batch.noise.double(), {k: v.double() for k, v in batch.cond.items()})
        direction = torch.randn(len(gates.weights), generator=torch.manual_seed(1)).double()

        def value(shift):
            lambdas(gates, 1.0 + shift * direction)
            torch.manual_seed(2)
            return objective.gates_loss(batch).value

        value(0.0).backward()
        slope = (gates.weights.grad * direction).sum()
        with torch.no_grad():
            quotient = (value(1e-4) - value(-1e-4)) / 2e-4
        torch.testing.assert_close(slope, quotient, rtol=2e-3, atol=1e-6)
        assert slope.abs() > 1e-3
    finally:
        network.float()


def test_one_draw_holds_for_all_steps_of_a_sample_and_samples_differ(shapes, monkeypatch):
    seen = []
    real = ecodiff.narrowed

    def watched(denoiser, keep):
        seen.append(keep)
        return real(denoiser, keep)

    monkeypatch.setattr(ecodiff, "narrowed", watched)
    objective = made(shapes, **CHAIN, first=0.0)
    objective.gates_loss(batch_of(shapes))
    assert len(seen) == 1  # for both steps
    first, second, _ = next(iter(seen[0].values()))
    assert not torch.equal(first, second)


# what is cut


def test_what_stays_is_ranked_by_kind_and_no_layer_loses_all(shapes):
    gates = WidthGates.for_objective(shapes)
    torch.manual_seed(0)
    lambdas(gates, torch.randn_like(gates.weights) + 5)  # none is below 0: ranks alone count
    kept = gates.kept(0.25)
    for kind in ("heads", "neurons"):
        names = [n for n, w in gates.layers.items() if w.kind == kind]
        total = sum(gates.layers[n].count for n in names)
        assert sum(len(kept[n]) for n in names) == total - round(0.25 * total)
        parts = gates.split(gates.weights.detach())
        lost = [v for n in names for i, v in enumerate(parts[n]) if i not in kept[n]]
        assert max(lost) < min(v for n in names for i, v in enumerate(parts[n]) if i in kept[n])
    first = next(iter(gates.layers))
    with torch.no_grad():
        gates.split(gates.weights)[first].sub_(100)
    assert len(gates.kept(0.25)[first]) == 1
    assert all(gates.kept(0.99).values())


@pytest.mark.parametrize("source", ["shapes", "digits"])
@torch.no_grad()
def test_the_cut_network_is_the_one_whose_other_gates_are_closed(source):
    teacher = load(source)
    network, gates = source_of(teacher), WidthGates.for_objective(teacher)
    torch.manual_seed(0)
    lambdas(gates, torch.randn_like(gates.weights))
    objective = made(teacher, prune=0.4)
    lambdas(objective.gates, gates.weights)
    change = objective.smaller()["change"]
    backbone = changed(network.backbone, {}, {}, [], change=change)
    cut = network.twin(backbone.eval(), network.schedule)
    batch = batch_of(teacher)
    t = torch.full((3,), 0.7)
    with narrowed(network, closed(network.backbone, change)):
        expected = network(batch.noise, t, batch.cond)
    torch.testing.assert_close(cut(batch.noise, t, batch.cond), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, network(batch.noise, t, batch.cond), atol=1e-3)


def test_what_is_taught_is_a_student_without_them_that_loads_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "SAMPLES", 4)
    teacher = load("shapes")
    folders.export(student_of(teacher), teacher, tmp_path / "student", {})
    tree = {
        "teacher": {"source": str(tmp_path / "student")},
        "objective": {"name": "ecodiff", "prune": 0.3},
        "players": {"gates": {"lr": 0.1}},
        "data": {"source": "shapes"},
        "train": {"steps": 2, "batch": 4, "log_every": 1, "save_every": 2},
        "eval": {"protocol": None},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    summary = teach(str(file), tmp_path / "run", [], False)
    heads = [v for v in summary["change"].values() if v["kind"] == "heads"]
    assert heads and summary["steps"] == 2
    sizes = summary["compressed"]
    assert sizes["after"]["weights"] < sizes["before"]["weights"]
    left = tmp_path / "run" / "pruned"
    config = json.loads((left / "unet" / "config.json").read_text())
    assert config["changed_units"] == summary["change"]
    generator, loaded = folders.load_student(left)
    folders.verify(left, generator, loaded)  # in another process, by diffusers and its own source


# what is refused


def test_a_network_whose_heads_cannot_be_cut_is_refused(tmp_path):
    from tests.helpers import families_a

    families_a.dit(tmp_path / "dit")
    with refused("teacher*", "DiTTransformer2DModel"):
        made(load(str(tmp_path / "dit")))


@pytest.mark.parametrize(
    ("keys", "place"),
    [({"prune": 0.0}, "objective.prune"), ({"prune": 1.0}, "objective.prune"),
     ({"times": (0.5, 1.0)}, "objective.times")],
)  # fmt: skip
def test_fields_that_leave_nothing_to_do_are_refused(shapes, keys, place):
    with refused(place):
        made(shapes, **keys)


def test_sections_of_a_student_are_refused():
    tree = {
        "teacher": {"source": "shapes"}, "objective": {"name": "ecodiff"},
        "train": {"steps": 4, "batch": 4}, "data": {"prompts": "shapes"},
    }  # fmt: skip
    for key, value in (("adapters", {}), ("student", {"steps": 4})):
        with refused(f"*{key}"):
            Recipe.check({**tree, key: value}, "recipe")
