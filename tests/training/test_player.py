"""What a player does to its gradient and its weights, seen by an optimiser that hides nothing."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from distill.config.optimizer import OptimizerConfig
from distill.training import player as players
from distill.training.player import Player, average_gradients
from tests.helpers.refusals import refused


def player(moves, *shapes, steps=10):
    """A player whose optimiser is plain gradient descent: a weight moves by lr times what it got.

    AdamW's first step has one length whatever the gradient's was.
    """
    weights = [nn.Parameter(torch.zeros(s)) for s in shapes or ((3,),)]
    found = Player(weights, Accelerator(cpu=True), moves, steps)
    found.optimizer = torch.optim.SGD(found.params, lr=1.0)
    return weights, found


def moved(moves, gradient):
    (weight,), mover = player(moves, gradient.shape)
    with mover.turn(0):
        (gradient * weight).sum().backward()
    return -weight.detach() / moves.lr, mover


@pytest.mark.parametrize("clip", [0.5, 1.0, 4.0])
def test_a_gradient_that_is_too_long_is_shortened_to_the_clip_and_keeps_its_direction(clip):
    gradient = torch.tensor([3.0, -4.0, 12.0])  # of length 13
    found, mover = moved(OptimizerConfig(lr=0.5, clip=clip), gradient)
    torch.testing.assert_close(found, gradient * clip / 13, rtol=1e-4, atol=1e-6)
    assert mover.grad_norm.item() == pytest.approx(13)  # what is logged is before the clip


@pytest.mark.parametrize("clip", [0.0, 20.0])
def test_a_gradient_within_the_clip_is_left_as_it_is_and_a_clip_of_zero_is_none(clip):
    gradient = torch.tensor([3.0, -4.0, 12.0])
    found, _ = moved(OptimizerConfig(lr=0.5, clip=clip), gradient)
    torch.testing.assert_close(found, gradient)


def test_the_clip_is_of_all_weights_together():
    (a, b), mover = player(OptimizerConfig(lr=1.0, clip=1.0), (1,), (1,))
    with mover.turn(0):
        (3 * a + 4 * b).sum().backward()
    assert (a.item(), b.item()) == (pytest.approx(-0.6, rel=1e-4), pytest.approx(-0.8, rel=1e-4))


def test_a_cosine_is_no_line():
    moves = OptimizerConfig(lr=2.0, decay="cosine", decay_steps=8)
    for age, left in ((0, 1), (2, (1 + 0.5**0.5) / 2), (4, 0.5), (6, (1 - 0.5**0.5) / 2), (8, 0)):
        assert moves.rate(age, 99) == pytest.approx(2 * left, abs=1e-12)
    ends = OptimizerConfig(lr=2.0, decay="cosine", decay_steps=3, lr_end=0.25)
    assert ends.rate(1, 99) == pytest.approx(2 * (0.25 + 0.75 * (1 + math.cos(math.pi / 3)) / 2))


def test_the_rate_of_a_turn_follows_the_schedule_from_its_start():
    (weight,), mover = player(
        OptimizerConfig(lr=1.0, clip=0, warmup=3, decay="linear", decay_steps=8)
    )
    seen = []
    for step in range(4):
        before = weight.detach().clone()
        with mover.turn(step):
            weight.sum().backward()
        seen.append((before - weight.detach())[0].item())
    assert seen == pytest.approx([1 / 4, 2 / 4 * 7 / 8, 3 / 4 * 6 / 8, 5 / 8])


def test_every_key_of_a_players_moves_reaches_its_optimiser():
    moves = OptimizerConfig(lr=0.3, betas=(0.7, 0.95), eps=1e-5, weight_decay=0.2)
    weight = nn.Parameter(torch.tensor([2.0]))
    mover = Player([weight], Accelerator(cpu=True), moves, 10)
    expected, mean, square = 2.0, 0.0, 0.0
    for step, gradient in enumerate((0.5, -0.1)):
        with mover.turn(step):
            (gradient * weight).sum().backward()
        mean = 0.7 * mean + 0.3 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        expected *= 1 - 0.3 * 0.2
        root = (square / (1 - 0.95 ** (step + 1))) ** 0.5
        expected -= 0.3 * mean / (1 - 0.7 ** (step + 1)) / (root + 1e-5)
        assert weight.item() == pytest.approx(expected, rel=1e-5)


class Two:
    """Stands in for Accelerate on the first of two processes; the other's gradients are `theirs`
    times its own."""

    num_processes = 2

    def __init__(self, theirs):
        self.theirs, self.lengths = theirs, []

    def reduce(self, flat, reduction):
        self.lengths.append(len(flat))
        total = flat + self.theirs * flat
        return total / 2 if reduction == "mean" else total


def test_gradients_of_two_processes_are_averaged_bucket_by_bucket(monkeypatch):
    monkeypatch.setattr(players, "BUCKET", 5)
    shapes = ((2, 2), (3,), (1,), (7,))
    weights = [nn.Parameter(torch.zeros(s)) for s in shapes]
    for i, weight in enumerate(weights[:3]):
        weight.grad = torch.arange(weight.numel()).float().view(weight.shape) + i
    both = Two(3.0)
    average_gradients(weights, both)
    for i, weight in enumerate(weights[:3]):
        mine = torch.arange(weight.numel()).float().view(weight.shape) + i
        torch.testing.assert_close(weight.grad, 2 * mine)
    assert not weights[3].grad.any()  # it had none here, and may have one there
    assert both.lengths == [7, 8]


def test_frozen_weights_are_those_in_whose_names_the_expression_is_found():
    network = nn.ModuleDict({"time_embedding": nn.Linear(2, 2), "out": nn.Linear(2, 1)})
    assert len(OptimizerConfig().learning(network, "student")) == 4
    found = OptimizerConfig(frozen="time_embedding").learning(network, "student")
    assert found == list(network["out"].parameters())
    assert OptimizerConfig(frozen=r"bias$").learning(network, "student") == [
        network["time_embedding"].weight, network["out"].weight,
    ]  # fmt: skip
    for none in ("nothing", ".*"):
        with refused("players.student.frozen", "out.bias"):
            OptimizerConfig(frozen=none).learning(network, "student")
    with pytest.raises(ValueError, match="no regular expression"):
        OptimizerConfig(frozen="(")
