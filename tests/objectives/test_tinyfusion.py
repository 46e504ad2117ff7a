"""TinyFusion: gates on units, how they are drawn and learn, and the pipeline without some."""

import json
from copy import deepcopy

import pytest
import torch
import yaml

from distill.config.recipe import Recipe
from distill.objectives.base import Batch
from distill.objectives.noise_levels import Uniform
from distill.objectives.smaller.tinyfusion import DepthGates, TinyFusion
from distill.planning import compress
from distill.pretrain.pixels import teach
from distill.training.networks import objective_of
from eval import shapes as drawings
from students.architecture.change import changed
from students.architecture.gates import gated
from students.architecture.units import skipping, units
from students.generator import Generator
from students.schedulers import source_of
from teachers import load
from teachers.denoiser import Guided
from teachers.reduced.network import REMOVED
from tests.helpers import families_a
from tests.helpers.refusals import refused

MIDDLE = ["mid_block.resnets.0", "mid_block.resnets.1"]


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A DiT of four blocks, with random weights: its blocks change what goes through them."""
    folder = tmp_path_factory.mktemp("dit")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families_a.TRANSFORMER, "num_layers", 4)
        families_a.dit(folder)
    teacher = load(str(folder))
    blocks = teacher.denoiser.backbone.transformer_blocks
    for block in blocks:  # published ones have one embedding, which is there once for each block
        block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
    return teacher


@pytest.fixture(scope="module")
def shapes():
    return load("shapes")


def inputs(teacher, n=4):
    torch.manual_seed(0)
    prompts = [*range(n)] if teacher.codec.classes else ["a red circle", "two blue squares"] * n
    cond = teacher.codec.condition(prompts[:n])
    return torch.randn(n, *teacher.shape), torch.full((n,), 0.6), cond


def made(teacher, **keys):
    network = source_of(teacher).requires_grad_(False)
    return TinyFusion(
        teacher=Guided(network, 1.0, teacher.codec.null), student=Generator(network),
        recovery=network, gates=DepthGates.for_objective(teacher), **keys,
    )  # fmt: skip


# gates


@pytest.mark.parametrize("source", ["dit", "shapes", "digits"])
@torch.no_grad()
def test_open_gates_are_the_teacher_closed_ones_skip_and_half_is_between(source, request):
    teacher = load("digits") if source == "digits" else request.getfixturevalue(source)
    network = source_of(teacher)
    names, (x_t, t, cond) = [*units(network.backbone)], inputs(teacher)
    whole = network(x_t, t, cond)
    with gated(network, dict.fromkeys(names, torch.ones(4))):
        assert torch.equal(network(x_t, t, cond), whole)
    assert torch.equal(network(x_t, t, cond), whole)  # the hooks are gone
    with skipping(network.backbone, names[:2]):
        without = network(x_t, t, cond)
    assert not torch.allclose(whole, without, atol=1e-3)
    with gated(network, dict.fromkeys(names[:2], torch.tensor([0.0, 1.0, 0.0, 1.0]))):
        found = network(x_t, t, cond)
    torch.testing.assert_close(found[::2], without[::2])
    torch.testing.assert_close(found[1::2], whole[1::2])
    last = names[-1]
    block = dict(network.backbone.named_modules())[last]
    seen = []

    def see(module, args, kwargs, output):
        seen.append(args[0] if args else kwargs["hidden_states"])
        seen.append(output[0] if isinstance(output, tuple) else output)

    with block.register_forward_hook(see, with_kwargs=True, prepend=True):
        network(x_t, t, cond)
        with gated(network, {last: torch.full((4,), 0.25)}):
            block.register_forward_hook(see, with_kwargs=True)  # sees what the gates made of it
            network(x_t, t, cond)
    block._forward_hooks.popitem()
    x, out, _, _, _, mixed = seen
    torch.testing.assert_close(mixed, 0.25 * out + 0.75 * x)


@torch.no_grad()
def test_guidances_two_halves_have_the_same_gates(shapes):
    network, (x_t, t, cond) = source_of(shapes), inputs(shapes)
    guided, gates = Guided(network, 3.0, shapes.codec.null), torch.tensor([0.0, 1.0, 1.0, 0.0])
    with gated(guided, {MIDDLE[0]: gates}):
        found = guided(x_t, t, cond)
    with skipping(network.backbone, MIDDLE[:1]):
        without = guided(x_t, t, cond)
    torch.testing.assert_close(found[gates == 0], without[gates == 0])
    torch.testing.assert_close(found[gates == 1], guided(x_t, t, cond)[gates == 1])


# how they are drawn


def gates_of(count, keep, of):
    gates = DepthGates([f"blocks.{i}" for i in range(count)])
    gates.shape(keep, of, torch.device("cpu"))
    return gates


@pytest.mark.parametrize(("count", "keep", "of"), [(8, 2, 4), (7, 5, 7), (6, 1, 2)])
def test_at_the_start_every_unit_is_kept_as_often_as_any(count, keep, of):
    torch.manual_seed(0)
    gates = gates_of(count, keep, of)
    drawn = gates(4000, 4.0)
    assert drawn.shape == (4000, count)
    torch.testing.assert_close(drawn, drawn.round(), atol=1e-5, rtol=0)  # each is 0 or 1
    kept = drawn.unflatten(1, (-1, of)).sum(2)
    torch.testing.assert_close(kept, torch.full_like(kept, keep), atol=1e-5, rtol=0)
    error = (drawn.mean(0) - keep / of).abs().max()
    assert error < 4.5 * (keep / of * (1 - keep / of) / 4000) ** 0.5
    assert len({tuple(row.tolist()) for row in drawn.round()}) > 1  # one for each sample


def test_a_hard_draw_has_the_gradient_of_the_soft_one():
    gates, weights = gates_of(8, 2, 4), torch.randn(5, 8, generator=torch.manual_seed(1))
    torch.manual_seed(2)
    (gates(5, 0.7) * weights).sum().backward()
    found = gates.weights.grad.clone()
    torch.manual_seed(2)
    leaf = gates.weights.detach().clone().requires_grad_(True)
    noise = -torch.empty(5, 2, 6).exponential_().log()  # Gumbel's
    soft = ((100 * leaf + noise) / 0.7).softmax(2) @ gates.ways
    (soft.flatten(1) * weights).sum().backward()
    torch.testing.assert_close(found, leaf.grad)
    assert found.abs().max() > 0.1


def test_what_a_small_gap_of_the_weights_means():
    """0.038 is a probability of 0.9 among the six ways of 2 in 4, and of 0.978 between two."""
    for ways, keep, of, expected in ((6, 2, 4, 0.9), (2, 1, 2, 0.978)):
        gates = gates_of(of, keep, of)
        assert gates.weights.shape == (1, ways)
        torch.testing.assert_close(gates.weights.detach(), torch.full((1, ways), 0.02))
        with torch.no_grad():
            gates.weights[0, 1] += 0.038
        probability = gates.probabilities()[0, 1].item()
        assert probability == pytest.approx(expected, abs=2e-3)
        torch.manual_seed(0)  # and so often it is drawn, at any temperature
        drawn = (gates(4000, 0.1).round() == gates.ways[1]).all(1).float().mean().item()
        assert drawn == pytest.approx(expected, abs=0.02)


def test_the_likeliest_way_decides_and_the_temperature_falls_evenly(dit):
    gates = gates_of(8, 2, 4)
    with torch.no_grad():
        gates.weights[0, 5] += 0.001  # keeps 2 and 3
        gates.weights[1, 0] += 0.001  # keeps 4 and 5
    assert gates.removed() == ["blocks.0", "blocks.1", "blocks.6", "blocks.7"]
    objective = made(dit, anneal_steps=100)
    steps = [objective.temperature_at(k) for k in (0, 50, 100, 200)]
    assert steps == pytest.approx([4.0, 2.05, 0.1, 0.1])


# what they learn


def test_the_loss_is_the_networks_own_of_the_network_that_was_drawn(shapes):
    objective, (x, _, cond) = made(shapes, keep=5, of=7, drop=0.0), inputs(shapes)
    batch = Batch(x, torch.randn_like(x), cond)
    torch.manual_seed(3)
    (turn,) = objective.turns(0)
    assert turn.players == ("recovery", "gates")
    loss = turn.loss(batch)
    torch.manual_seed(3)
    network = source_of(shapes)
    t = objective.times.sample(x, network.process)
    gates = objective.gates(4, 4.0)
    expected = []
    for i, row in enumerate(gates.round().bool()):
        gone = [n for n, stays in zip(objective.gates.units, row, strict=True) if not stays]
        assert len(gone) == 2
        alpha, sigma = network.process.scales(t[i])
        state = alpha * x[i : i + 1] + sigma * batch.noise[i : i + 1]
        with torch.no_grad(), skipping(network.backbone, gone):
            out = network.call(state, t[i : i + 1], {"text": cond["text"][i : i + 1]}, None)
        expected.append((out - (alpha * batch.noise[i] - sigma * x[i])).square().mean())
    torch.testing.assert_close(loss.value, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)
    loss.value.backward()
    assert objective.gates.weights.grad.abs().max() > 0
    torch.testing.assert_close(loss.logs["likeliest"], torch.tensor(1 / 21))


def test_gates_learn_to_keep_the_layers_that_the_loss_needs(shapes):
    """In a few steps of the gates alone: the two cheapest of seven layers go, and no other."""
    objective = made(shapes, keep=5, of=7, drop=0.0, anneal_steps=20)
    optimizer = torch.optim.Adam(objective.gates.parameters(), lr=1e-2)
    objective.times = Uniform(0.3, 0.9)
    captions = drawings.all_captions()[::40][:16]
    images = drawings.draw(captions, 0).float() / 127.5 - 1
    x, cond = shapes.codec.encode(images), shapes.codec.condition(captions)
    torch.manual_seed(0)
    for step in range(14):
        loss = objective.loss(Batch(x, torch.randn_like(x), cond), step)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    ways = objective.gates.probabilities()[0] @ objective.gates.ways
    stays = dict(zip(objective.gates.units, ways.tolist(), strict=True))
    assert [name for name, p in stays.items() if p < 0.5] == MIDDLE
    assert min(p for name, p in stays.items() if name not in MIDDLE) > 5 / 7


def test_what_learns_beside_the_gates_is_an_adapter_or_a_copy(shapes):
    tree = {
        "teacher": {"source": "shapes"},
        "objective": {"name": "tinyfusion", "keep": 5, "of": 7},
        "adapters": {"rank": 2},
        "data": {"source": "shapes"}, "train": {"steps": 4, "batch": 4},
    }  # fmt: skip
    objective = objective_of(Recipe.check(tree, "r"), load("shapes"), torch.device("cpu"))
    assert all("lora" in name for name in objective.recovery.trainable())
    del tree["adapters"]
    whole = objective_of(Recipe.check(tree, "r"), load("shapes"), torch.device("cpu"))
    sizes = [sum(p.numel() for p in o.recovery.parameters()) for o in (objective, whole)]
    assert sizes[0] < sizes[1] / 20
    assert sizes[1] == sum(p.numel() for p in source_of(shapes).parameters())


# what is left


def test_a_network_of_blocks_without_those_that_go_has_a_stock_form(dit):
    gates, network = DepthGates.for_objective(dit), source_of(dit)
    gates.shape(1, 2, torch.device("cpu"))
    with torch.no_grad():
        gates.weights[0, 1] += 1
    assert gates.removed() == ["transformer_blocks.0", "transformer_blocks.3"]
    smaller = changed(network.backbone, {}, {}, gates.removed())
    assert type(smaller) is type(network.backbone) and smaller.config.num_layers == 2
    twin, (x_t, t, cond) = network.twin(smaller.eval(), network.schedule), inputs(dit)
    with torch.no_grad(), gated(network, dict.fromkeys(gates.removed(), torch.zeros(4))):
        torch.testing.assert_close(network(x_t, t, cond), twin(x_t, t, cond))


def test_the_first_block_of_a_dit_stays_where_the_output_reads_an_embedding_of_its_own(dit):
    backbone = deepcopy(source_of(dit).backbone)
    assert [*units(backbone)] == [f"transformer_blocks.{i}" for i in range(4)]
    backbone.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1.bias.data += 1
    assert [*units(backbone)] == [f"transformer_blocks.{i}" for i in range(1, 4)]


def test_what_is_taught_is_the_teacher_without_the_layers_that_go(tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "SAMPLES", 4)
    tree = {
        "teacher": {"source": "digits"},
        "objective": {"name": "tinyfusion", "keep": 3, "of": 5},
        "adapters": {"rank": 2},
        "data": {"source": "digits"},
        "train": {"steps": 3, "batch": 8, "log_every": 1, "save_every": 2},
    }
    count = len(units(source_of(load("digits")).backbone))
    tree["objective"] |= {"keep": count - 2, "of": count}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    summary = teach(str(file), tmp_path / "run", [], False)
    assert len(summary["remove"]) == 2 and summary["steps"] == 3
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["likeliest"][0] < 0.2
    small, whole = (load(str(s)).denoiser.backbone for s in (tmp_path / "run" / "pruned", "digits"))
    assert small.config[REMOVED] == summary["remove"]
    old = whole.state_dict()
    assert all(torch.equal(v, old[k]) for k, v in small.state_dict().items())
    again = teach(str(file), tmp_path / "run", ["train.steps=4"], True)
    assert again["steps"] == 4 and not list((tmp_path / "run").glob(".pruned*"))


# what is refused


@pytest.mark.parametrize(
    ("keys", "place", "words"),
    [
        ({"keep": 7, "of": 7}, "objective.keep", "7 of 7"),
        ({"keep": 1, "of": 2}, "objective.of", "7 layers"),
    ],
)
def test_groups_that_there_cannot_be_are_refused(shapes, keys, place, words):
    with refused(place, words):
        made(shapes, **keys)


def test_too_many_ways_are_refused():
    with refused("objective.of", "40,116,600"):
        gates_of(28, 14, 28)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"adapters": {"players": ["student"]}}, "adapters"),
        ({"student": {"steps": 4}}, "student"),
        ({"train": {"checkpointing": True}}, "train.checkpointing"),
    ],
)
def test_keys_that_do_not_go_with_it_are_refused(change, place):
    tree = {
        "teacher": {"source": "shapes"}, "objective": {"name": "tinyfusion", "keep": 5, "of": 7},
        "data": {"source": "shapes"}, **change,
        "train": {"steps": 4, "batch": 4, **change.get("train", {})},
    }  # fmt: skip
    with refused(f"*{place}"):
        Recipe.check(tree, "recipe")


def test_a_teacher_of_no_folder_is_refused_before_any_work(tmp_path):
    file = tmp_path / "recipe.yaml"
    tree = {"teacher": {"source": str(tmp_path)}, "data": {"source": "shapes"},
            "objective": {"name": "tinyfusion"}, "train": {"steps": 4, "batch": 4}}  # fmt: skip
    file.write_text(yaml.safe_dump(tree))
    with refused("teacher*"):
        teach(str(file), tmp_path / "run", [], False)
    assert not (tmp_path / "run").exists()
