"""Games of student and critic, their penalties and SAN's directions, in closed form."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from distill.config.objectives import DMD2, FDistill
from distill.config.recipe import Recipe
from distill.objectives.adversarial.ladd import LADD
from distill.objectives.base import Batch
from distill.objectives.games import (
    Adversary,
    Reach,
    Shown,
    exact_slope,
    feature_slope,
    renormalise,
)
from distill.objectives.losses import critic_loss, generator_loss
from distill.objectives.noise_levels import Uniform
from students.critic import Critic, SANCritic
from students.generator import Generator
from teachers import load
from teachers.denoiser import Network
from teachers.process import Linear
from tests.helpers.refusals import refused
from tests.helpers.toys import Affine

D = torch.float64
CLEAN = Uniform(0, 0)  # of Linear: no noise at all
N = 4000


class Still(nn.Module):
    """A teacher that is only asked for its process."""

    def __init__(self):
        super().__init__()
        self.process = Linear()


class Line(nn.Module):
    """A critic whose logit is a x + b of one dimension; it notes what it was shown."""

    def __init__(self, a=0.0, b=0.0):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=D)) for v in (a, b))
        self.seen = []

    def forward(self, x_t, t, cond=None):
        self.seen.append((x_t, t, cond))
        return self.a * x_t[:, 0] + self.b


class Square(Line):
    """A critic whose logit is a x²."""

    def forward(self, x_t, t, cond=None):
        return self.a * x_t[:, 0].square()


def game_of(critic, m, r=1.0, **fields):
    """The objective of a student m + r z before a critic of clean samples."""
    network = Affine(torch.full((1,), m, dtype=D), torch.full((1, 1), r, dtype=D), Linear())
    fields = {"critic_times": CLEAN, **fields}
    return LADD(teacher=Still(), student=Generator(network), critic=critic, **fields), network


def quantiles(n=N):
    """Of N(0, 1): its expectations, nearly, without chance."""
    u = (torch.arange(n, dtype=D) + 0.5) / n
    return torch.distributions.Normal(0, 1).icdf(u)[:, None].to(D)


def played(objective, player, batch):
    turn = next(t for t in objective.turns(0) if t.players == (player,))
    return turn.loss(batch)


# ---- the games


def test_the_games_are_their_published_formulas():
    fake, real = torch.tensor([-2.0, 0.5]), torch.tensor([3.0, -0.5])
    soft = nn.functional.softplus
    table = {
        "logistic": (soft(-real) + soft(fake), soft(-fake)),
        "hinge": ((1 - real).clamp(min=0) + (1 + fake).clamp(min=0), -fake),
        "relativistic": (soft(-(real - fake)), soft(-(fake - real))),
    }
    for game, (critic, student) in table.items():
        torch.testing.assert_close(critic_loss(fake, real, game), critic.mean())
        torch.testing.assert_close(generator_loss(fake, game, real), student.mean())


def field(game, theta, psi, **fields):
    """(-∂ψ, -∂θ) of the two losses: data at 0, the student at θ, and a critic ψ x."""
    critic = Line(psi)
    objective, network = game_of(critic, theta, 0.0, game=game, **fields)
    batch = Batch(torch.zeros(8, 1, dtype=D), torch.zeros(8, 1, dtype=D))
    played(objective, "critic", batch).value.backward()
    down = critic.a.grad.item()
    critic.zero_grad()
    played(objective, "student", batch).value.backward()
    return torch.tensor([-down, -network.m.grad.item()], dtype=D)


def eigenvalues(game, **fields):
    """Of the field's derivative at the equilibrium (0, 0)."""
    h = 1e-4
    columns = [
        (field(game, *(h * v), **fields) - field(game, *(-h * v), **fields)) / (2 * h)
        for v in (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))  # along ψ, then θ
    ]
    return torch.linalg.eigvals(torch.stack(columns, 1))


@pytest.mark.parametrize("penalty", ["r1", "r2"])
@pytest.mark.parametrize(
    ("game", "slope"), [("logistic", 0.5), ("relativistic", 0.5), ("hinge", 1)]
)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 4.0])
def test_the_dirac_gan_turns_without_a_penalty_and_is_damped_with_one(game, slope, gamma, penalty):
    """-γ/2 ± √(γ²/4 - slope²): ±0.5i at γ = 0, one value at 1, -0.064 at 4."""
    found = sorted(eigenvalues(game, **{penalty: gamma}).tolist(), key=lambda v: (v.real, v.imag))
    root = complex(gamma**2 / 4 - slope**2) ** 0.5
    expected = sorted((-gamma / 2 - root, -gamma / 2 + root), key=lambda v: (v.real, v.imag))
    near = 1e-3 if abs(root) < 1e-6 else 1e-6  # of a double eigenvalue, the root of rounding
    assert found == pytest.approx(expected, abs=near)


def test_the_logistic_critics_optimum_is_the_log_ratio():
    """N(0, 1) against N(m, 1): -m x + m²/2."""
    critic = Line()
    objective, _ = game_of(critic, 0.8)
    batch = Batch(quantiles(), quantiles())
    optimizer = torch.optim.LBFGS(critic.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = played(objective, "critic", batch).value
        loss.backward()
        return loss

    optimizer.step(closure)
    assert critic.a.item() == pytest.approx(-0.8, abs=5e-3)
    assert critic.b.item() == pytest.approx(0.32, abs=5e-3)


def test_with_the_exact_critic_the_students_gradient_is_the_softened_reverse_kls():
    objective, network = game_of(Line(-0.8, 0.32), 0.8)
    played(objective, "student", Batch(quantiles(), quantiles())).value.backward()
    assert network.m.grad.item() == pytest.approx(0.45583, abs=1e-4)


@pytest.mark.parametrize("kind", [Critic, SANCritic])
def test_heads_of_zeros_give_the_hinge_game_no_gradient_and_the_critic_a_loss_of_2(kind):
    teacher = load("digits")
    cond = {"class_labels": torch.arange(4)}
    critic = kind(teacher.denoiser, teacher.shape, teacher.codec.condition([0]))
    last = critic.directions[0].scale if kind is SANCritic else critic.heads[0][-1].weight
    with torch.no_grad():
        last.zero_()
        if kind is Critic:
            critic.heads[0][-1].bias.zero_()
    student = Generator(deepcopy(teacher.denoiser).requires_grad_(True))
    objective = LADD(teacher=teacher.denoiser, student=student, critic=critic, game="hinge")
    batch = Batch(torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), cond)
    loss = played(objective, "student", batch)
    assert loss.value.item() == 0
    (grad,) = torch.autograd.grad(loss.value, loss.samples)
    assert not grad.any()
    told = played(objective, "critic", batch)
    assert told.value.item() == pytest.approx(2)


def test_the_relativistic_game_compares_pairs_of_one_condition_and_one_time():
    critic = Line(0.7)
    objective, _ = game_of(critic, 1.0, 0.5, game="relativistic", critic_times=Uniform(0.2, 0.9))
    labels = {"class_labels": torch.arange(6)}
    batch = Batch(torch.randn(6, 1, dtype=D), torch.randn(6, 1, dtype=D), labels)
    played(objective, "student", batch)
    played(objective, "critic", batch)
    (_, s, c), (_, t, e), (x_t, both, joined) = critic.seen
    assert torch.equal(s, t) and torch.equal(c["class_labels"], e["class_labels"])
    assert torch.equal(*both.chunk(2)) and torch.equal(*joined["class_labels"].chunk(2))
    assert both.unique().numel() == 6
    fake, real = x_t.chunk(2)
    x = 1.0 + 0.5 * batch.noise
    ours, theirs = ((v - (1 - both[:6, None]) * y) for v, y in ((fake, x), (real, batch.data)))
    assert not torch.allclose(ours, theirs)  # the noise is each one's own


def test_with_same_noise_samples_and_data_have_one_time_and_one_noise():
    critic = Line(0.7)
    objective, _ = game_of(critic, 1.0, 0.5, same_noise=True, critic_times=Uniform(0.2, 0.9))
    batch = Batch(torch.randn(6, 1, dtype=D), torch.randn(6, 1, dtype=D))
    played(objective, "critic", batch)
    ((x_t, t, _),) = critic.seen
    fake, real = x_t.chunk(2)
    assert torch.equal(*t.chunk(2))
    gap = (1 - t[:6, None]) * (1.0 + 0.5 * batch.noise - batch.data)
    torch.testing.assert_close(fake - real, gap)


# ---- penalties


@pytest.mark.parametrize("side", ["r1", "r2"])
def test_an_exact_penalty_is_half_gamma_of_the_squared_slope_on_its_side(side):
    """ℓ = a x²: |∇ℓ|² = 4 a² x², whose derivative along a is 8 a x²; data at 2, samples at 3."""
    critic, gamma, a = Square(0.1), 0.6, 0.1
    objective, _ = game_of(critic, 3.0, 0.0, **{side: gamma})
    batch = Batch(torch.full((5, 1), 2.0, dtype=D), torch.zeros(5, 1, dtype=D))
    loss = played(objective, "critic", batch)
    x = 2.0 if side == "r1" else 3.0
    assert loss.logs[side].item() == pytest.approx(4 * a**2 * x**2)
    assert set(loss.logs) == {"critic", "accuracy", side}
    game = math.log1p(math.exp(a * 9)) + math.log1p(math.exp(-a * 4))
    assert loss.value.item() == pytest.approx(game + gamma / 2 * 4 * a**2 * x**2)
    loss.value.backward()
    plain = 9 / (1 + math.exp(-a * 9)) - 4 / (1 + math.exp(a * 4))
    assert critic.a.grad.item() == pytest.approx(plain + gamma / 2 * 8 * a * x**2)


def test_the_approximate_penalty_tends_to_the_exact_one(monkeypatch):
    """ℓ = a x², a step δ: ((a (x + δ)² - a x²) / δ)² = a² (2 x + δ)², at the noised input."""
    batch = Batch(torch.full((5, 1), 2.0, dtype=D), torch.zeros(5, 1, dtype=D))
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    for step in (0.5, 0.1, 1e-4):
        critic = Square(0.1)
        objective, _ = game_of(
            critic, 3.0, 0.0, r1=0.6, penalty="approximate", penalty_step=step,
            critic_times=Uniform(0.25, 0.25),
        )  # fmt: skip
        x = 0.75 * 2.0 + 0.25  # noised
        found = played(objective, "critic", batch).logs["r1"].item()
        assert found == pytest.approx(0.1**2 * (2 * x + step) ** 2, rel=1e-6)
    exact, _ = game_of(Square(0.1), 3.0, 0.0, r1=0.6, critic_times=Uniform(0.25, 0.25))
    assert found == pytest.approx(played(exact, "critic", batch).logs["r1"].item(), rel=1e-4)


def test_the_approximate_penalty_sees_all_directions_and_the_same_time():
    critic = Line(0.3)
    objective, _ = game_of(critic, 3.0, 0.0, r1=1.0, penalty="approximate")
    objective.critic_times = Uniform(0.5, 0.5)
    batch = Batch(torch.zeros(N, 1, dtype=D), torch.zeros(N, 1, dtype=D))
    torch.manual_seed(0)
    loss = played(objective, "critic", batch)
    assert loss.logs["r1"].item() == pytest.approx(0.3**2, rel=0.1)  # a² E n²
    assert all((t == 0.5).all() for _, t, _ in critic.seen) and len(critic.seen) == 3


def test_an_exact_penalty_goes_through_attention_and_is_the_gradients_square():
    teacher = load("digits")
    torch.manual_seed(0)
    critic = Critic(
        teacher.denoiser.requires_grad_(False), teacher.shape, {"class_labels": torch.tensor([0])}
    )
    x_t, t = torch.randn(3, 1, 8, 8), torch.full((3,), 0.3)
    shown = Shown(x_t, t, {"class_labels": torch.tensor([1, 2, 3])})
    said = exact_slope(critic, shown)
    torch.testing.assert_close(said.logits, critic(*shown))
    for i in range(3):
        x = x_t.clone().requires_grad_()
        (grad,) = torch.autograd.grad(critic(x, *shown[1:])[i], x)
        torch.testing.assert_close(said.slope[i], grad[i].square().sum(), rtol=1e-4, atol=1e-6)
    said.slope.mean().backward()
    weight = critic.heads[0][-1].weight
    slope = (weight.grad * weight).sum()  # the slope's square is of degree two in the last weight
    torch.testing.assert_close(slope, 2 * said.slope.mean(), rtol=1e-4, atol=1e-6)


def test_a_features_penalty_is_of_what_the_heads_read():
    critic = two_scales(Critic)
    shown = Shown(torch.randn(3, 2, 4, 4), torch.rand(3), None)
    said = feature_slope(critic, shown)
    features = [f.detach().requires_grad_() for f in critic.features(*shown)]
    grads = torch.autograd.grad(critic.read(features).sum(), features)
    expected = sum(g.square().flatten(1).sum(1) for g in grads)
    torch.testing.assert_close(said.slope, expected)
    torch.testing.assert_close(said.logits, critic(*shown))
    said.slope.mean().backward()
    assert all(h[-1].weight.grad.abs().sum() > 0 for h in critic.heads)


# ---- SAN


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 1)

    def forward(self, x_t, t):
        return self.second(self.first(x_t))[:, :2]


def two_scales(kind):
    torch.manual_seed(1)
    denoiser = Network(Blocks(), Linear(), "x").requires_grad_(False)
    return kind(denoiser, (2, 4, 4), None, ("backbone.first", "backbone.second"))


def san(**fields):
    critic = two_scales(SANCritic)
    denoiser = critic._denoiser[0]
    fields = {"game": "hinge", "same_noise": True, **fields}
    objective = LADD(teacher=denoiser, student=Generator(denoiser), critic=critic, **fields)
    torch.manual_seed(2)
    batch = Batch(torch.randn(5, 2, 4, 4), torch.randn(5, 2, 4, 4))
    return objective, critic, batch


def test_a_san_critics_two_logits_have_one_value_and_gradients_of_their_own():
    critic = two_scales(SANCritic)
    x, t = torch.randn(3, 2, 4, 4), torch.rand(3)
    with torch.no_grad():
        for direction in critic.directions:
            direction.bias.normal_()
    logits, direction = critic.apart(critic.features(x, t))
    torch.testing.assert_close(logits, critic(x, t))
    torch.testing.assert_close(direction, logits)
    directions = [d.weight for d in critic.directions]
    others = [p for n, p in critic.named_parameters() if not n.endswith("weight") or "heads" in n]
    assert torch.autograd.grad(logits.sum(), directions, retain_graph=True, allow_unused=True) == (
        None, None)  # fmt: skip
    reached = torch.autograd.grad(direction.sum(), others, allow_unused=True)
    assert all(g is None for g in reached)


def test_a_san_critic_starts_as_the_critic_it_is_made_from_without_its_last_bias():
    plain, ours = two_scales(Critic), two_scales(SANCritic)
    with torch.no_grad():
        for head in plain.heads:
            head[-1].bias.zero_()
    x, t = torch.randn(3, 2, 4, 4), torch.rand(3)
    torch.testing.assert_close(ours(x, t), plain(x, t))
    assert all(d.weight.norm().item() == pytest.approx(1) for d in ours.directions)


def test_a_directions_gradient_is_the_wasserstein_losss_along_the_sphere():
    objective, critic, batch = san()
    torch.manual_seed(3)
    loss = played(objective, "critic", batch)
    loss.value.backward()
    torch.manual_seed(3)
    x = objective.samples(batch, objective.student, 0)
    t, noise = objective.drawn(x, objective.critic_times)
    sides = [critic.features(*objective.shown(y, None, t, noise)) for y in (x, batch.data)]
    fake, real = ([v.detach() for v in critic.vectors(side)] for side in sides)
    for direction, f, r in zip(critic.directions, fake, real, strict=True):
        omega, gap = direction.weight.detach(), (f - r).mean(0)
        along = direction.scale.detach() * (gap - omega * (omega @ gap)) / len(critic.directions)
        torch.testing.assert_close(direction.weight.grad, along, rtol=1e-4, atol=1e-6)
        assert abs(direction.weight.grad @ omega) < 1e-5


def test_a_san_critics_other_weights_learn_by_the_game_alone():
    objective, critic, batch = san(game="logistic")
    torch.manual_seed(3)
    played(objective, "critic", batch).value.backward()
    torch.manual_seed(3)
    x = objective.samples(batch, objective.student, 0)
    t, noise = objective.drawn(x, objective.critic_times)
    logits = [critic(*objective.shown(y, None, t, noise)) for y in (x, batch.data)]
    plain = critic_loss(*logits)
    for name in ("scale", "bias"):
        weight = getattr(critic.directions[0], name)
        (grad,) = torch.autograd.grad(plain, weight, retain_graph=True)
        torch.testing.assert_close(weight.grad, grad)
        assert grad.abs().sum() > 0


def test_directions_are_unit_vectors_after_every_step_of_the_objective():
    objective, critic, batch = san()
    before = [d.weight.detach().clone() for d in critic.directions]
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.5)
    for turn in objective.turns(0):
        if turn.players == ("critic",):
            turn.loss(batch).value.backward()
            optimizer.step()
            assert any(abs(d.weight.norm() - 1) > 1e-4 for d in critic.directions)
    for direction, old in zip(critic.directions, before, strict=True):
        assert direction.weight.norm().item() == pytest.approx(1, abs=1e-6)
        assert not torch.equal(direction.weight, old)
    renormalise(two_scales(Critic))  # one without directions stays as it is
    renormalise(None)


def test_dmd2_also_renormalises_after_its_critics_turn():
    _, critic, _ = san()
    denoiser = critic._denoiser[0]
    objective = DMD2(teacher=denoiser, student=Generator(denoiser), fake=denoiser, critic=critic)
    with torch.no_grad():
        critic.directions[0].weight.mul_(3)
    for turn in objective.turns(1):
        assert turn.players == ("fake", "critic")
    assert critic.directions[0].weight.norm().item() == pytest.approx(1, abs=1e-6)


def test_a_critic_on_vectors_and_tokens_can_have_directions_too():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(6, 8)

        def forward(self, x_t, t):
            return self.embed(x_t)[..., :6]

    for shape in ((6,), (5, 6)):
        denoiser = Network(Tokens(), Linear(), "x")
        torch.manual_seed(0)
        plain = Critic(denoiser, shape, None, ("backbone.embed",))
        torch.manual_seed(0)
        ours = SANCritic(denoiser, shape, None, ("backbone.embed",))
        x, t = torch.randn(3, *shape), torch.rand(3)
        bias = next(p for n, p in plain.named_parameters() if n.endswith("out.bias"))
        torch.testing.assert_close(ours(x, t) + bias, plain(x, t))


# ---- what goes together


def test_f_distill_refuses_a_critic_whose_logits_are_no_log_ratios():
    objective, critic, _ = san()
    networks = {
        "teacher": objective.teacher,
        "student": objective.student,
        "fake": objective.teacher,
    }
    with refused("objective.game", "log-ratios"):
        FDistill(**networks, critic=two_scales(Critic), game="hinge")
    with refused("critic.san", "log-ratios"):
        FDistill(**networks, critic=critic)


def test_shared_samples_have_no_pairs_for_the_relativistic_game():
    objective, critic, _ = san()
    networks = {
        "teacher": objective.teacher,
        "student": objective.student,
        "fake": objective.teacher,
    }
    with refused("objective.share_samples", "relativistic"):
        DMD2(**networks, critic=critic, share_samples=True, game="relativistic")


def test_san_is_for_objectives_with_a_game():
    tree = {"teacher": "digits", "data": {"source": "digits"}, "critic": {"san": True}}
    tree["train"] = {"steps": 1, "batch": 2}
    assert Recipe.check({**tree, "objective": {"name": "ladd"}}).critic.san
    with refused("critic.san", "ladd"):
        Recipe.check({**tree, "objective": {"name": "sida"}})
    assert issubclass(DMD2, Adversary)


def test_an_exact_penalty_is_refused_where_activations_are_recomputed():
    tree = {"teacher": "digits", "data": {"source": "digits"}, "critic": {}}
    tree["train"] = {"steps": 1, "batch": 2, "checkpointing": True}
    with refused("objective.penalty", "train.checkpointing"):
        Recipe.check({**tree, "objective": {"name": "ladd", "r2": 0.1}})
    for keys in ({}, {"r2": 0.1, "penalty": "approximate"}, {"r1": 0.1, "penalty": "features"}):
        Recipe.check({**tree, "objective": {"name": "ladd", **keys}})


def test_dmd2s_critic_has_the_penalty_at_the_weight_of_its_loss():
    _, critic, batch = san()
    denoiser, plain = critic._denoiser[0], two_scales(Critic)
    values = []
    for r1 in (0.0, 0.5):
        objective = DMD2(
            teacher=denoiser, student=Generator(denoiser), fake=denoiser, critic=plain,
            critic_weight=0.25, r1=r1,
        )  # fmt: skip
        torch.manual_seed(4)
        loss = objective.fake_and_critic_loss(batch, objective.student)
        values.append(loss.value.item())
    slope = loss.logs["r1"].item()
    assert slope > 1e-4
    assert values[1] - values[0] == pytest.approx(0.25 * 0.5 / 2 * slope, rel=1e-2)


# ---- Diffusion-GAN's reach


def stepped(objective, batch, parts=1):
    """Play a step, whose critic's turn has so many parts."""
    for turn in objective.turns(0):
        for _ in range(parts if turn.players == ("critic",) else 1):
            turn.loss(batch)


def raced(b, **fields):
    """A game whose critic says b of everything, with the critic's times of all levels."""
    critic = Line(0.0, b)
    reach = Reach(**{"low": 0.1, "high": 0.5, "steps": 4, "clean": 0.0, **fields})
    objective, _ = game_of(critic, 0.5, reach=reach, critic_times=Uniform(1.0, 1.0))
    return objective, critic, Batch(torch.randn(64, 1, dtype=D), torch.randn(64, 1, dtype=D))


@pytest.mark.parametrize("parts", [1, 3])
def test_the_reach_rises_by_its_step_to_its_end_where_data_are_told_surely(parts):
    objective, critic, batch = raced(2.0)
    for expected in (0.1, 0.2, 0.3, 0.4, 0.5, 0.5):
        critic.seen.clear()
        stepped(objective, batch, parts)
        times = torch.cat([t for _, t, _ in critic.seen])
        torch.testing.assert_close(times, torch.full_like(times, expected))


def test_the_reach_falls_to_its_least_where_they_are_not_and_stays_at_the_target():
    objective, _, batch = raced(-1.0)
    objective.reached = torch.tensor(0.5)
    for expected in (0.4, 0.3, 0.2, 0.1, 0.1):
        stepped(objective, batch)
        assert objective.reached.item() == pytest.approx(expected)
    reach = Reach(target=0.5, low=0.1, high=0.5, steps=4)
    now = torch.tensor(0.3)
    for heard, step in ((torch.tensor([6.0, 8.0]), 0.1), (torch.tensor([4.0, 8.0]), 0.0),
                        (torch.tensor([-8.0, 8.0]), -0.1)):  # fmt: skip
        assert reach.moved(now, heard).item() == pytest.approx(0.3 + step)


def test_a_share_of_samples_and_of_data_is_clean():
    objective, critic, batch = raced(2.0, clean=0.25, low=0.5)
    batch = Batch(torch.randn(N, 1, dtype=D), torch.randn(N, 1, dtype=D))
    stepped(objective, batch)
    times = torch.cat([t for _, t, _ in critic.seen])
    assert (times == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert set(times.tolist()) == {0.0, 0.5}


def test_without_a_reach_times_are_the_critics_own_and_with_it_a_run_resumes():
    objective, critic, batch = raced(2.0)
    stepped(objective, batch)
    state = objective.state_dict()
    again, _, _ = raced(2.0)
    again.load_state_dict(state)
    assert again.share(batch.noise) == objective.share(batch.noise) == pytest.approx(0.2)
    objective.reach, seeds = None, []
    assert game_of(critic, 0.5)[0].state_dict() == {}
    for reach in (None, Reach(low=1.0, clean=0.0)):
        objective.reach, objective.reached = reach, None
        critic.seen.clear()
        torch.manual_seed(3)
        x = torch.randn(8, 1, dtype=D)
        torch.manual_seed(4)
        seeds.append(objective.drawn_for_critic(x, Uniform(0.2, 0.7)))
    assert all(map(torch.equal, *seeds))


def test_a_reach_needs_logits_that_mean_something_by_themselves():
    tree = Recipe.load("digits/ladd", []).tree()
    tree["objective"] |= {"reach": {"steps": 100}, "game": "relativistic"}
    with refused("objective.reach", "relativistic"):
        Recipe.check(tree, "recipe")
    tree["objective"]["game"] = "hinge"
    Recipe.check(tree, "recipe")
