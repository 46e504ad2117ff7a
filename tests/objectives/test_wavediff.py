"""Denoising diffusion GANs: pairs of states, the game between them, and what x̂ is held to."""

import math

import pytest
import torch
from torch import nn

from distill.config.recipe import Recipe
from distill.objectives.adversarial.wavediff import WaveDiff
from distill.objectives.base import Batch
from students.critic import NOISIER, NOISIER_TIME, Critic, PairCritic
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.denoiser import Denoiser
from teachers.process import Karras, Linear, Tabulated
from tests.helpers.noise_predictors import labels, predictor
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree
from tests.objectives.test_turns import Level, Slope

D = torch.float64
FOUR = (1.0, 0.75, 0.5, 0.25)


class Known(Denoiser):
    """A student that returns the same x̂ everywhere."""

    def __init__(self, x, process):
        super().__init__()
        self.process, self.x = process, nn.Parameter(torch.tensor(x, dtype=D))

    def forward(self, x_t, t, cond=None, s=None):
        return self.x.expand_as(x_t)


class LogRatio(nn.Module):
    """β times log p(x_s | x_t) of data over that of samples, of N(0, var) data and the exact x̂."""

    def __init__(self, teacher, beta=1.0):
        super().__init__()
        self.teacher, self.beta = teacher, nn.Parameter(torch.tensor(beta, dtype=D))

    def variances(self, s, t):
        """Of x_s given x_t: of data, and of samples of the posterior."""
        (a, b), (a_s, b_s) = self.teacher.process.scales(t), self.teacher.process.scales(s)
        added = b**2 - (a / a_s * b_s) ** 2
        fake = b_s**2 * added / b**2
        var = self.teacher.values[0]
        rest = var * b**2 / (a**2 * var + b**2)  # of x given x_t
        return fake + (a_s * added / b**2) ** 2 * rest, fake

    def forward(self, x_s, s, cond=None):
        x_t, t = cond[NOISIER], cond[NOISIER_TIME]
        real, fake = self.variances(s, t)
        mean = self.teacher.process.posterior(x_t, self.teacher(x_t, t), t, s, 0 * x_t)
        square = (x_s - mean)[:, 0] ** 2
        return self.beta * (square / fake - square / real + (fake / real).log()) / 2


def made(chain=FOUR, process=None, critic=None, n=16, network=None, **fields):
    """An objective of small random networks, its student and a batch with labels."""
    process = process or Linear()
    network = network or predictor(2, process, "flow")
    student = Generator(network, chain, renoise="posterior").keep(len(chain))
    torch.manual_seed(0)
    batch = Batch(torch.randn(n, 3, dtype=D), torch.randn(n, 3, dtype=D), labels(n))
    critic = Slope(0.5) if critic is None else critic
    teacher = predictor(1, process, "flow")
    return WaveDiff(teacher=teacher, student=student, critic=critic, **fields), student, batch


# ---- pairs of states


@pytest.mark.parametrize("process", [Linear(), Karras(), Tabulated.scaled_linear()], ids=repr)
def test_a_pair_is_of_neighbouring_times_of_one_chain_of_the_same_data(process):
    objective, student, batch = made(process=process, n=200_000)
    batch = batch._replace(x=torch.full_like(batch.data, 0.4))
    x_t, t, x_s, s = objective.pair(batch, student, 1)
    assert sorted(set(zip(t.tolist(), s.tolist(), strict=True))) == sorted(
        zip(FOUR, (*FOUR[1:], 0.0), strict=True)
    )
    (a, b), (a_s, b_s) = process.at(t, x_t), process.at(s, x_t)
    for k in FOUR:
        here = t == k
        e_t, e_s = (x_t - 0.4 * a)[here], (x_s - 0.4 * a_s)[here]
        size, size_s = b[here][0].item(), b_s[here][0].item()
        assert e_t.std().item() == pytest.approx(size, rel=0.01)
        assert e_s.std().item() == pytest.approx(size_s, rel=0.01)
        kept = (a / a_s)[here][0].item()
        wanted = kept * size_s**2
        assert (e_t * e_s).mean().item() == pytest.approx(wanted, abs=0.01 * size * size_s)


@pytest.mark.parametrize("process", [Linear(), Karras(0.01, 10), Tabulated.scaled_linear()])
def test_a_student_that_knows_the_datum_makes_the_pairs_of_data(process):
    """Then x_s' and x_s have one distribution given x_t: the same mean and covariance with it."""
    network = Known(0.4, process)
    objective, student, batch = made(process=process, network=network, n=400_000)
    batch = batch._replace(x=torch.full_like(batch.data, 0.4))
    pair = objective.pair(batch, student, 0)
    with torch.no_grad():
        x, fake = objective.sample(pair, batch, student)
    assert torch.equal(x, batch.data) and torch.equal(fake.cond[NOISIER], pair.x_t)
    for k in FOUR:
        here = pair.t == k
        spread = pair.x_s[here].std()
        for power in (lambda v: v, lambda v: v**2, lambda v: v * pair.x_t):
            real, ours = power(pair.x_s)[here], power(fake.x_t)[here]
            error = 6 * real.std() / (3 * here.sum()) ** 0.5 + 1e-12
            assert (real.mean() - ours.mean()).abs() < error, (k, spread)


# ---- the game


def game_of(beta, var=0.6):
    """The critic's loss where its logit is β times the log-ratio, and its gradient to β."""
    process = Karras(0.05, 5.0)
    teacher = Gaussian(torch.zeros(1, dtype=D), torch.full((1,), var, dtype=D), process)
    student = Generator(teacher, (1.0, 0.5), renoise="posterior").keep(2)
    critic = LogRatio(teacher, beta)
    objective = WaveDiff(teacher=teacher, student=student, critic=critic, r1=0)
    torch.manual_seed(0)
    data = teacher.sample(100_000)
    batch = Batch(data, torch.randn_like(data), None)
    value = objective.critic_loss(batch, student).value
    (slope,) = torch.autograd.grad(value, critic.beta)
    return value.item(), slope.item()


def test_the_log_ratio_of_the_states_is_the_critics_optimum():
    """x̂ has no spread, and so samples of the posterior have less than data."""
    (best, slope), (_, below), (_, above) = (game_of(beta) for beta in (1.0, 0.8, 1.25))
    assert abs(slope) < 4e-3 < 0.01 < min(-below, above), (below, slope, above)
    assert best < 2 * math.log(2) - 0.01


def test_of_data_without_spread_nothing_tells_samples_from_it():
    value, _ = game_of(1.0, var=1e-9)
    assert value == pytest.approx(2 * math.log(2), abs=1e-6)


def test_the_student_shall_pass_for_data_and_be_near_them():
    objective, student, batch = made(critic=Slope(0.5), fidelity_weight=0.0)
    torch.manual_seed(3)
    value = objective.student_loss(batch, student, 1).value
    torch.manual_seed(3)
    pair = objective.pair(batch, student, 1)
    _, fake = objective.sample(pair, batch, student)
    expected = nn.functional.softplus(-0.5 * fake.x_t.mean(1)).mean()
    torch.testing.assert_close(value, expected)


def test_without_a_game_it_is_kd_on_data():
    """The gradient is sign(x̂ - x) over the number of values, whatever the noisy state."""
    objective, student, batch = made(gan_weight=0.0, fidelity_weight=0.7)
    loss = objective.student_loss(batch, student, 0)
    (grad,) = torch.autograd.grad(loss.value, loss.samples)
    expected = 0.7 * (loss.samples - batch.data).sign() / batch.data.numel()
    torch.testing.assert_close(grad, expected)


def test_the_relativistic_game_compares_with_the_state_of_the_same_datum():
    objective, student, batch = made(game="relativistic", fidelity_weight=0.0)
    torch.manual_seed(3)
    value = objective.student_loss(batch, student, 1).value
    torch.manual_seed(3)
    pair = objective.pair(batch, student, 1)
    _, fake = objective.sample(pair, batch, student)
    gap = 0.5 * (pair.x_s - fake.x_t).mean(1)
    torch.testing.assert_close(value, nn.functional.softplus(gap).mean())


def test_penalties_come_in_every_kth_step_and_weigh_no_more_for_that():
    """The logit w mean(x_s) has the squared slope w²/3 in three dimensions."""
    objective, _, batch = made(r1=0.3, penalty_every=5, student_every=2)
    values = {}
    for step in (0, 1, 4, 5):
        turns = list(objective.turns(step))
        assert [t.players for t in turns] == [("student",), ("critic",)][step % 2 :]
        torch.manual_seed(1)
        values[step] = turns[-1].loss(batch)
    with_it = {step for step, loss in values.items() if "r1" in loss.logs}
    assert with_it == {0, 5}
    for step in (0, 5):
        logs = values[step].logs
        assert logs["r1"].item() == pytest.approx(0.5**2 / 3)
        added = values[step].value - logs["critic"]
        assert added.item() == pytest.approx(0.3 / 2 * 0.5**2 / 3)
    torch.testing.assert_close(values[1].value, values[1].logs["critic"])


def test_of_a_level_critic_neither_has_a_gradient_of_samples():
    objective, student, batch = made(critic=Level(0.0), fidelity_weight=0.0, r1=0)
    assert objective.critic_loss(batch, student).value.item() == pytest.approx(2 * math.log(2))
    assert objective.student_loss(batch, student).value.item() == pytest.approx(math.log(2))


# ---- what x̂ is held to


@pytest.mark.parametrize("process", [Linear(), Karras(0.05, 5.0), Tabulated.scaled_linear()])
def test_what_was_measured_is_explained_by_the_noisy_state_itself(process):
    """λ/2 |(α x̂ - x_t)/σ|²: 0 at x_t/α, half the dimensions at the datum, and a parabola."""
    objective, student, batch = made((0.8, 0.5), process, n=40_000, fidelity="measured")
    pair = objective.pair(batch, student, 0)
    alpha, sigma = process.at(pair.t, pair.x_t)
    best = (pair.x_t / alpha).requires_grad_()
    at_best = objective.distance(best, pair, batch)
    assert at_best.abs().max() < 1e-20
    (slope,) = torch.autograd.grad(objective.distance(best + 0.1, pair, batch).sum(), best)
    torch.testing.assert_close(slope, 0.1 * (alpha / sigma).expand_as(slope) ** 2)
    at_data = objective.distance(batch.data, pair, batch)
    assert at_data.mean().item() == pytest.approx(3 / 2, rel=0.02)


def test_the_fidelitys_weight_is_lambda_and_the_game_is_the_same():
    values = {}
    for name in ("data", "measured"):
        for weight in (0.0, 0.3):
            objective, student, batch = made(fidelity=name, fidelity_weight=weight)
            torch.manual_seed(3)
            values[name, weight] = objective.student_loss(batch, student, 1)
    assert torch.equal(values["data", 0.0].value, values["measured", 0.0].value)
    for name in ("data", "measured"):
        loss = values[name, 0.3]
        torch.testing.assert_close(loss.value, loss.logs["gan"] + 0.3 * loss.logs["fidelity"])
    gap = values["data", 0.3].logs["fidelity"] - values["measured", 0.3].logs["fidelity"]
    assert gap.abs() > 0.1


# ---- a critic of pairs


def test_a_critic_of_pairs_reads_both_states_each_at_its_own_time(pipelines):
    from teachers import load

    teacher = load(str(pipelines["edm"]), null_label=10)
    cond, blocks = teacher.codec.condition([0]), ("backbone.down_blocks.0", "backbone.mid_block")
    torch.manual_seed(0)
    critic = PairCritic(teacher.denoiser, teacher.shape, cond, blocks)
    x_s, x_t = torch.randn(2, 3, *teacher.shape)
    s, t = torch.tensor([0.2] * 3), torch.tensor([0.6] * 3)
    cond = {**teacher.codec.condition([1, 2, 3]), NOISIER: x_t, NOISIER_TIME: t}
    alone = Critic(teacher.denoiser, teacher.shape, teacher.codec.condition([0]), blocks)
    both = critic.features(x_s, s, cond)
    own, other = alone.features(x_s, s, cond), alone.features(x_t, t, cond)
    for pair, a, b in zip(both, own, other, strict=True):
        assert torch.equal(pair, torch.cat([a, b], 1))
    swapped = critic(x_t, t, {**cond, NOISIER: x_s, NOISIER_TIME: s})
    assert not torch.allclose(critic(x_s, s, cond), swapped)


# ---- recipes


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"critic": {"san": True}}, "critic.san"),
        ({"objective": {"name": "wavediff", "same_noise": True}}, "objective.same_noise"),
        ({"objective": {"name": "wavediff", "reach": {}}}, "objective.reach"),
        ({"objective": {"name": "wavediff", "fidelity": "none"}}, "objective.fidelity"),
    ],
)
def test_keys_that_it_does_not_read_are_refused(keys, key):
    with refused(f"*{key}*"):
        Recipe.check({**recipe_tree("wavediff", "digits"), **keys})


def test_chains_of_other_steps_are_refused():
    process = Karras()
    for renoise in (True, False):
        with refused("student.renoise"):
            student = Generator(predictor(2, process), FOUR, renoise)
            WaveDiff(teacher=student.denoiser, student=student, critic=Slope(0.5))
    student = Generator(predictor(2, process), (1.0,))  # of one step there is no other
    WaveDiff(teacher=student.denoiser, student=student, critic=Slope(0.5))
