"""Optimisers by name: the same numbers as AdamW where they are promised, and resumable."""

import importlib.util

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from distill.config.optimizer import OptimizerConfig
from distill.config.recipe import Recipe
from distill.planning import forecast
from distill.training import build, checkpoint, optimizers
from distill.training.player import Player
from teachers import load
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree

pytestmark = pytest.mark.device

HAVE = {"adamw8bit": importlib.util.find_spec("bitsandbytes") is not None}
NAMES = [
    pytest.param(n, marks=pytest.mark.skipif(not HAVE.get(n, True), reason="not installed"))
    for n in ("adamw", "adamw8bit", "adamw-offloaded")
]


def weights(seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(s)) for s in ((96, 64), (7,), (3, 5, 2))]


def player(name, params):
    moves = OptimizerConfig(optimizer=name, lr=3e-2, betas=(0.8, 0.99), weight_decay=0.1, warmup=2)
    return Player(params, Accelerator(), moves, 20)


def play(mover, steps):
    for step in steps:
        torch.manual_seed(step)
        with mover.turn(step, reset=step == 4):
            loss = sum((p * torch.randn_like(p)).sum() + p.pow(4).sum() for p in mover.params)
            loss.backward()


def test_offloaded_moments_give_adamws_numbers_bit_for_bit():
    ours, theirs = (player(n, weights()) for n in ("adamw-offloaded", "adamw"))
    for mover in (ours, theirs):
        play(mover, range(7))
    for a, b in zip(ours.params, theirs.params, strict=True):
        assert torch.equal(a, b)
        for key in optimizers.MOMENTS:
            assert torch.equal(ours.optimizer.state[a][key], theirs.optimizer.state[b][key])


@pytest.mark.gpu
def test_on_a_gpu_moments_rest_in_pinned_memory_and_give_the_same_numbers():
    found = []
    for name in ("adamw", "adamw-offloaded"):
        mover = player(name, [nn.Parameter(p.detach().cuda()) for p in weights()])
        play(mover, range(7))
        found.append([p.detach().cpu() for p in mover.params])
    state = mover.optimizer.state_dict()["state"][0]
    assert all(state[k].is_pinned() for k in optimizers.MOMENTS)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_player_taken_up_from_a_checkpoint_goes_on_bit_for_bit(name, tmp_path):
    whole = player(name, weights())
    play(whole, range(8))
    half = player(name, weights())
    play(half, range(6))
    checkpoint.save(half.state_dict(), tmp_path / "state")
    rest = player(name, weights(seed=1))
    rest.load_state_dict(checkpoint.load(tmp_path / "state"))
    play(rest, range(6, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole.params, rest.params, strict=True))


@pytest.mark.skipif(not HAVE["adamw8bit"], reason="not installed")
def test_eight_bit_moments_walk_within_a_tenth_of_adamws_way():
    start, (eight, full) = weights(), (player(n, weights()) for n in ("adamw8bit", "adamw"))
    for mover in (eight, full):
        play(mover, range(7))
    for at, a, b in zip(start, eight.params, full.params, strict=True):
        assert 0 <= (a - b).norm() < 0.1 * (b - at).norm()
    assert not torch.equal(eight.params[0], full.params[0])
    assert eight.optimizer.state[eight.params[0]]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_that_are_planned_are_those_of_the_state(name):
    mover = player(name, weights())
    play(mover, range(1))
    state = list(mover.optimizer.state.values())
    kept = [v for s in state for k, v in s.items() if k != "step" and not k.startswith("qmap")]
    device, host = optimizers.optimizer_bytes(name, mover.params)
    assert sum(v.nbytes for v in kept) == (host or device)
    if host:
        assert device == 8 * 96 * 64  # the largest weight's, which visit


def test_without_bitsandbytes_the_command_that_installs_it_is_named(
    pipelines, tmp_path, monkeypatch
):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    tree = recipe_tree("sid", pipelines["edm"])
    tree["players"] = {"fake": {"optimizer": "adamw8bit"}}
    with refused("players.fake.optimizer", "fewstep[memory]"):
        build.build(Recipe.check(tree), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_optimiser_is_named(pipelines):
    tree = recipe_tree("sid", pipelines["edm"])
    with refused("players.student.optimizer", "adamw", "adamw8bit", "adamw-offloaded"):
        Recipe.check({**tree, "players": {"student": {"optimizer": "adamw8bits"}}})


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.slow
def test_a_plan_moves_offloaded_moments_to_the_host(pipelines):
    """The plan of a run whose optimisers keep their moments on the host."""
    tree = recipe_tree("sid", pipelines["edm"])
    tree["players"] = {k: {"optimizer": "adamw-offloaded"} for k in ("student", "fake")}
    plan = forecast.plan(Recipe.check(tree))
    copies = load(str(pipelines["edm"])).denoiser, load(str(pipelines["edm"])).denoiser
    sizes = [p.numel() for copy in copies for p in copy.parameters()]
    assert plan.host == pytest.approx(8 * sum(sizes), rel=0.01)  # students have no null label
    assert plan.optimizer == 2 * 8 * max(sizes)
