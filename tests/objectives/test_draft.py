"""DRaFT against gradients by hand, and what a quadratic reward makes of a Gaussian."""

import pytest
import torch

from distill.config.objectives import DMD2, DRaFT
from distill.config.recipe import Recipe
from distill.data.stream import Source
from distill.objectives.base import Batch, Turn
from distill.objectives.noise_levels import Uniform
from distill.rewards.rewards import rehearse, rewarded
from eval import shapes
from students import schedulers
from students.generator import Generator
from students.lora import Adapter
from teachers import load
from teachers.analytic import Gaussian
from teachers.errors import UserError
from teachers.process import Karras, Linear
from tests.helpers.refusals import refused
from tests.helpers.toys import Affine, Fitted, Slopes, recipe_tree

D = torch.float64
WANTED = 2.0  # m' of the reward -(x - m')² / 2
SLOPES = {1.0: 0.3, 0.5: 0.7}  # x̂ = k x_t at the two times of a chain


def slopes(*values):
    return Slopes(torch.tensor([*SLOPES], dtype=D), torch.tensor(values, dtype=D), Linear())


def quadratic(x, batch, weight=1.0):
    return -0.5 * weight * (x - WANTED).square().sum(1)


def made(reward=quadratic, renoise=False, values=(0.3, 0.7), **fields):
    """DRaFT of a student of two steps; the teacher's slopes are 0.4 and 0.6."""
    student = Generator(slopes(*values), [*SLOPES], renoise).keep(2)
    objective = DRaFT(teacher=slopes(0.4, 0.6).requires_grad_(False), student=student, **fields)
    objective.reward = reward
    return objective


def draws(*values):
    return Batch(None, torch.tensor(values, dtype=D)[:, None])


def gradient(objective, batch, seed=0):
    """Of the loss with respect to the two slopes."""
    torch.manual_seed(seed)
    loss = objective.loss(batch, 0).value
    return torch.autograd.grad(loss, objective.student.denoiser.slopes)[0]


def by_hand(batch):
    """x̂, and its derivatives with respect to the slopes: x_½ = ½ k₁ z + ½ z, x̂ = k₂ x_½."""
    z, (first, last) = batch.noise[:, 0], SLOPES.values()
    x_t = 0.5 * first * z + 0.5 * z
    return last * x_t, 0.5 * last * z, x_t


@pytest.mark.parametrize(("last_steps", "reaches"), [(None, 1), (2, 1), (1, 0)])
def test_the_gradient_is_the_chain_rules_through_the_last_steps(last_steps, reaches):
    batch = draws(1.0, -0.4, 2.5)
    x, by_first, by_last = by_hand(batch)
    found = gradient(made(last_steps=last_steps), batch)
    force = x - WANTED  # of the loss, at each x̂
    expected = torch.stack([reaches * (force * by_first).mean(), (force * by_last).mean()])
    torch.testing.assert_close(found, expected)


def test_draft_k_of_all_steps_is_draft_also_where_samples_are_renoised():
    batch = draws(1.0, -0.4, 2.5)
    values = [gradient(made(renoise=True, last_steps=k), batch) for k in (None, 2)]
    assert torch.equal(*values)
    truncated = gradient(made(renoise=True, last_steps=1), batch)
    assert truncated[0] == 0 and truncated[1] == values[0][1] and values[0][0] != 0


@pytest.mark.parametrize("noises", [1, 3])
def test_draft_lv_averages_unbiased_gradients_of_the_last_step(noises):
    """x̂' = k (½ x̂ + ½ ε): the mean of (x̂' - m') x_t over ε is k (¼ x̂² + ¼) - ½ m' x̂."""
    n = 200_000
    batch = draws(*[1.5] * n)
    x, _, by_last = (v[0] for v in by_hand(batch))
    found = gradient(made(last_steps=1, noises=noises), batch)
    mean = SLOPES[0.5] * (x**2 + 1) / 4 - WANTED * x / 2
    expected = ((x - WANTED) * by_last + noises * mean) / (1 + noises)
    assert found[0] == 0
    assert found[1].item() == pytest.approx(expected.item(), abs=0.01)
    assert abs(mean - (x - WANTED) * by_last) > 0.1  # the two terms differ


@pytest.mark.parametrize(
    "fields", [{}, {"last_steps": 1}, {"last_steps": 1, "noises": 2}, {"anchor": 0.5}]
)
def test_a_constant_reward_moves_nothing_and_one_of_weight_zero_leaves_the_anchor(fields):
    batch = draws(1.0, -0.4, 2.5)
    plain = gradient(made(lambda x, b: 3 + 0 * x[:, 0], renoise=True, **fields), batch)
    none = gradient(made(lambda x, b: quadratic(x, b, 0.0), renoise=True, **fields), batch)
    assert torch.equal(plain, none)
    assert plain.any() == ("anchor" in fields)


@pytest.mark.parametrize("renoise", [True, False, 0.5])
def test_the_anchor_is_the_teachers_chain_from_the_same_noise(renoise):
    batch = draws(1.0, -0.4, 2.5)
    same = made(renoise=renoise, anchor=1.0, values=(0.4, 0.6))
    assert same.loss(batch, 0).logs["drift"] == 0
    other = made(renoise=renoise, anchor=1.0)
    assert other.loss(batch, 0).logs["drift"] > 1e-3
    assert gradient(other, batch).all()


def test_an_adapter_in_a_stock_form_starts_on_its_anchor():
    """The shapes' network by noise indices: the teacher's chain is the untrained student's."""
    teacher = load("shapes")
    student = schedulers.student(teacher, 2, adapter=Adapter(rank=4))
    objective = DRaFT(teacher=teacher.denoiser, student=student, anchor=1.0)
    cond = teacher.codec.condition(shapes.captions(2, seed=1))
    batch = Batch(None, torch.randn(2, *teacher.shape), cond)
    assert objective.loss(batch, 0).logs["drift"] < 1e-10


# ---- what a quadratic reward makes of a Gaussian: m = (m_T/c² + λ m') / (1/c² + λ)

MEAN, SPREAD, WEIGHT = -1.0, 0.8, 0.5


def one_step(m, r):
    """x̂ = m + r z from σ_max, and all but its first two moments of a batch of noise removed."""
    return Affine(torch.tensor([m], dtype=D), torch.tensor([[r]], dtype=D))


def moments(n=2000):
    z = torch.randn(n // 2, 1, dtype=D, generator=torch.Generator().manual_seed(1))
    z = torch.cat([z, -z])
    return Batch(None, z / z.square().mean().sqrt())


def descended(network, loss, rate, steps):
    for _ in range(steps):
        grads = torch.autograd.grad(loss(), (network.m, network.r))
        with torch.no_grad():
            for p, g in zip((network.m, network.r), grads, strict=True):
                p -= rate * g
    return network.m.item(), network.r.item() ** 2


def draft_of(anchor):
    network = one_step(0.3, 1.2)
    teacher = one_step(MEAN, SPREAD).requires_grad_(False)
    objective = DRaFT(teacher=teacher, student=Generator(network), anchor=anchor)
    objective.reward = lambda x, b: quadratic(x, b, WEIGHT)
    return descended(network, lambda: objective.loss(moments(), 0).value, 0.3, 200)


def test_an_anchor_of_half_the_precision_gives_the_optimums_mean():
    """The variance is c² (1/c² / (1/c² + λ))², less than the KL's: samples, not laws, are held."""
    precision = SPREAD**-2
    mean, variance = draft_of(precision / 2)
    total = precision + WEIGHT
    assert mean == pytest.approx((precision * MEAN + WEIGHT * WANTED) / total, rel=1e-6)
    assert variance == pytest.approx(SPREAD**2 * (precision / total) ** 2, rel=1e-6)
    assert variance < 1 / total


def test_without_an_anchor_all_samples_become_the_best_one():
    mean, variance = draft_of(0.0)
    assert mean == pytest.approx(WANTED, rel=1e-6)
    assert variance < 1e-12


def matched(sigma, floor=1.0):
    """DMD2 with the reward, compared at one noise level: mean and variance where it ends.

    The fake score is exact. Errors are all below `floor`, so the gradient is the KL's times
    σ² / floor, and the reward has that weight too.
    """
    network = one_step(0.3, 1.2)
    process = Karras()
    level = process.time(torch.tensor([sigma], dtype=D)).item()
    teacher = Gaussian(torch.tensor([MEAN], dtype=D), torch.tensor([SPREAD**2], dtype=D), process)
    objective = DMD2(
        teacher=teacher, student=Generator(network), fake=Fitted(network),
        times=Uniform(level, level), error_floor=floor,
    )  # fmt: skip
    objective.reward = lambda x, b: quadratic(x, b, WEIGHT * sigma**2 / floor)
    batch = moments()
    turn = Turn(("student",), lambda b: objective.student_loss(b, objective.student))

    def loss():
        return rewarded(turn.loss(batch), batch, turn, objective).value

    torch.manual_seed(0)
    return descended(network, loss, 0.1 * floor / sigma**2, 300)


def test_distribution_matching_and_a_reward_end_at_the_tilted_gaussian():
    """Undiffused, un-normalised reverse KL less λ R: N(mean, 1 / (1/c² + λ))."""
    total = SPREAD**-2 + WEIGHT
    mean, variance = matched(0.02)
    assert mean == pytest.approx((SPREAD**-2 * MEAN + WEIGHT * WANTED) / total, abs=0.01)
    assert variance == pytest.approx(1 / total, rel=0.01)


def test_at_higher_noise_it_ends_elsewhere():
    """With scores at σ = ½ the optimum's mean is that of a teacher of variance c² + σ²."""
    mean, _ = matched(0.5, floor=100.0)
    precision = 1 / (SPREAD**2 + 0.25)
    expected = (precision * MEAN + WEIGHT * WANTED) / (precision + WEIGHT)
    undiffused = (SPREAD**-2 * MEAN + WEIGHT * WANTED) / (SPREAD**-2 + WEIGHT)
    assert mean == pytest.approx(expected, abs=0.03)
    assert abs(expected - undiffused) > 0.1


# ---- refusals


def test_noises_repeat_the_last_step_only():
    for last_steps in (None, 2):
        with refused("objective.noises", "last_steps"):
            made(noises=2, last_steps=last_steps)


def test_gradients_flow_through_no_more_steps_than_there_are():
    with refused("objective.last_steps", "3 steps of a student of 2"):
        made(last_steps=3)


def test_a_reward_must_be_there_and_have_a_gradient(pipelines):
    tree = recipe_tree("draft", pipelines["edm"])
    assert Recipe.check(tree).kind is DRaFT
    with pytest.raises(UserError, match="rewards: missing"):
        Recipe.check({**tree, "rewards": {}})
    source = Source((1,), torch.randn(4, 1, dtype=D), None, seed=0, size=4)
    with refused("rewards", "gradient"):
        rehearse(made(lambda x, b: x.detach()[:, 0]), source, "cpu")
