"""CDM's flags on DMD2: chains of random length and times, and matching beside the chains."""

import random

import pytest
import torch

from distill.objectives.base import Batch, Loss
from distill.objectives.distribution.dmd2 import DMD2
from distill.objectives.dmd2_options.alignment import Alignment
from distill.objectives.dmd2_options.random_chains import RandomChains, sample_chain
from distill.objectives.losses import surrogate
from students.generator import Generator
from teachers.analytic import Gaussian
from teachers.process import Karras, Linear, Tabulated
from tests.helpers.noise_predictors import NULL, guided, labels, predictor
from tests.helpers.refusals import refused

D = torch.float64
TIMES = (1.0, 0.75, 0.5, 0.25)


def made(process=None, scale=4.5, n=16, renoise=False, **fields):
    """An objective with a guided teacher, a student of four steps, and a batch."""
    process = process or Linear()
    predicts = "eps" if isinstance(process, Tabulated) else "flow"
    teacher, fake, network = (predictor(seed, process, predicts) for seed in (1, 2, 3))
    student = Generator(network, TIMES, renoise).keep(4)
    torch.manual_seed(0)
    batch = Batch(None, torch.randn(n, 3, dtype=D), labels(n))
    objective = DMD2(teacher=guided(teacher, scale), student=student, fake=fake, **fields)
    return objective, student, batch


def played(objective, batch, seed=5):
    """The student's loss of step 0 as its turn computes it, its gradient, and the fake's loss."""
    random.seed(seed)
    torch.manual_seed(seed)
    first, second = objective.turns(0)
    loss = first.loss(batch)
    grads = torch.autograd.grad(loss.value, list(objective.student.parameters()))
    return loss, grads, second.loss(batch).value


# ---- random chains


class Fixed(RandomChains):
    """Chains that are the stock one, at places that are drawn as the plain loss draws them."""

    def times(self):
        random.choices([4], [4])
        return list(TIMES[1:])


@pytest.mark.parametrize("process", [Linear(), Tabulated.scaled_linear()], ids=str)
@pytest.mark.parametrize("renoise", [True, False])
@pytest.mark.parametrize("fake_sees", ["last", "places"])
def test_at_the_stock_times_the_loss_is_the_plain_one(process, renoise, fake_sees):
    losses = []
    for fields in ({}, {"schedule": Fixed()}):
        objective, _, batch = made(process, renoise=renoise, fake_sees=fake_sees, **fields)
        losses.append(played(objective, batch))
    (plain, grads, fake), (same, same_grads, same_fake) = losses
    assert abs(plain.value - same.value) < 1e-12 and abs(fake - same_fake) < 1e-12
    for a, b in zip(grads, same_grads, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_other_times_give_another_gradient():
    grads = []
    for fields in ({}, {"schedule": RandomChains(3, 5)}):
        objective, _, batch = made(**fields)
        grads.append(played(objective, batch)[1][0])
    assert (grads[0] - grads[1]).abs().max() > 0.05 * grads[0].abs().max()


@pytest.mark.parametrize("even", [False, True])
def test_chains_have_all_lengths_and_times_between_low_and_high(even):
    _, student, _ = made()
    chains = RandomChains(2, 5, low=0.2, high=0.8, even=even)
    random.seed(0)
    drawn = [sample_chain(student, chains) for _ in range(4000)]
    lengths = [len(s.times) for s, _ in drawn]
    for n in range(2, 6):
        assert lengths.count(n) / 4000 == pytest.approx(0.25, abs=0.03)
    later = torch.tensor([t for s, _ in drawn for t in s.times[1:]])
    assert 0.2 < later.min() < 0.21 and 0.79 < later.max() < 0.8
    assert later.mean().item() == pytest.approx(0.5, abs=0.01)
    assert all(s.times[0] == 1.0 for s, _ in drawn)
    places = [p / (len(s.times) - 1) for s, p in drawn if len(s.times) > 1]
    assert min(places) == 0 and max(places) == 1
    for chain, _ in drawn:
        bins = [int((t - 0.2) / 0.6 * (len(chain.times) - 1)) for t in chain.times[1:]]
        if even:
            assert sorted(bins) == list(range(len(chain.times) - 1))
    spread = [s for s, _ in drawn if len(s.times) == 5]
    middle = torch.tensor([s.times[2] for s in spread])  # the second largest of four
    wanted = 0.6 / 4 / 12**0.5 if even else 0.6 * (6 / 25 / 6) ** 0.5
    assert middle.std().item() == pytest.approx(wanted, rel=0.1)


def test_a_chain_is_the_students_own_but_for_its_times():
    network = predictor(3, Karras(), "flow")
    student = Generator(network, (0.9, 0.5), True, 0.002, 3.0)
    student.gamma = 0.3
    random.seed(0)
    chain, place = sample_chain(student, RandomChains(4, 4, high=0.8))
    assert chain.denoiser is network and chain.times[0] == 0.9 and len(chain.times) == 4
    assert (chain.renoise, chain.floor, chain.start, chain.gamma) == (True, 0.002, 3.0, 0.3)
    assert 0 <= place < 4 and student.times == (0.9, 0.5)


def test_processes_that_are_seeded_alike_draw_the_same_chain():
    _, student, _ = made()
    drawn = []
    for _ in range(2):
        random.seed(3)
        torch.rand(1)  # differs between processes
        drawn.append(sample_chain(student, RandomChains()))
    assert drawn[0][0].times == drawn[1][0].times and drawn[0][1] == drawn[1][1]


def test_the_fake_learns_from_intermediate_samples_of_the_same_chain():
    objective, _, batch = made(schedule=RandomChains(6, 6), fake_sees="places")
    random.seed(4)
    chain, place = sample_chain(objective.student, objective.schedule)
    seen = []
    objective.fake.loss = lambda x, t, cond: seen.append(x) or x.sum()
    random.seed(4)
    _, turn = objective.turns(0)
    turn.loss(batch)
    assert torch.equal(seen[0], chain.rollout(batch.noise, batch.cond, place))


# ---- alignment


@pytest.mark.parametrize("guides", [True, False])
@pytest.mark.parametrize("process", [Linear(), Linear(3.0)], ids=str)
def test_the_term_is_the_published_one(process, guides):
    """x_s = x_i + (σ_s - σ_i) v_i; x̂ there is noised again and matched."""
    fields = {"alignment": Alignment(weight=0.7, guided=guides)}
    objective, student, batch = made(process, **fields)
    torch.manual_seed(5)
    loss = objective.student_loss(batch, student, 1)
    found = torch.autograd.grad(loss.value, list(student.parameters()))
    torch.manual_seed(5)
    plain, same, _ = made(process)
    torch.manual_seed(5)
    expected = plain.student_loss(batch, same, 1)
    with torch.no_grad():
        x_i, t_i = same.inputs(batch.noise, batch.cond, 1), same.ends(batch.noise, 1)
        x = same.denoiser(x_i, t_i, batch.cond)
        sigma_i = process.scales(t_i)[1][:, None]
        v_i = (x_i - x) / sigma_i
        s = (0.02 + 0.96 * torch.rand(16)).double()
        x_s = x_i + (process.scales(s)[1][:, None] - sigma_i) * v_i
    again = same.denoiser(x_s, s, batch.cond)
    with torch.no_grad():
        t = 0.02 + 0.96 * torch.rand(16)
        x_t = process.noise(again, t, torch.randn_like(again))
        real = plain.teacher.denoiser(x_t, t, batch.cond)
        if guides:
            null = {"class_labels": torch.full((16,), NULL)}
            real = real + 3.5 * (real - plain.teacher.denoiser(x_t, t, null))
        grad = (plain.fake(x_t, t, batch.cond) - real) / (again - real).abs().mean(1, keepdim=True)
    value = expected.value + 0.7 * surrogate(again, grad)
    torch.testing.assert_close(loss.value, value, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(value, list(same.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_without_guidance_the_gradient_is_the_unguided_teachers(scale):
    objective, student, batch = made(scale=scale)
    x, ends = torch.randn(16, 3, dtype=D), student.ends(batch.noise)
    torch.manual_seed(0)
    found, _ = objective.gradient(x, ends, batch, guided=False)
    objective.teacher = objective.teacher.denoiser
    torch.manual_seed(0)
    expected, _ = objective.gradient(x, ends, batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_place_leaves_the_exact_path_with_the_square_of_the_way():
    """Along the velocity of an exact ODE; halving the way quarters the error."""
    process = Linear()
    teacher = Gaussian(torch.zeros(2, dtype=D), torch.tensor([0.3, 0.6], dtype=D), process)
    t, x_t = torch.full((64,), 0.5, dtype=D), torch.randn(64, 2, dtype=D)

    def error(way):
        seen = []
        objective = DMD2(teacher=teacher, student=Generator(teacher), fake=teacher)
        chain = Generator(predictor(3, process, "flow"))
        chain.denoiser.forward = lambda x, *rest: seen.append(x) or x.requires_grad_()
        beside = Alignment(low=t[0].item() + way, high=t[0].item() + way + 1e-9)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(objective, "gradient", lambda x, s, batch, guided: (x, x))
            loss = Loss(torch.zeros(()))
            beside.added(loss, objective, chain, (x_t, t), teacher(x_t, t), Batch(None, x_t))
        return (seen[0] - teacher.flow(x_t, t, t + way)).abs().mean().item()

    for way in (0.02, -0.02):
        assert error(way) / error(way / 2) == pytest.approx(4, abs=0.3)


def test_the_bend_is_none_where_paths_are_straight():
    """A student whose x̂ is the same all along."""
    objective, student, batch = made(alignment=Alignment())
    with torch.no_grad():
        for p in student.parameters():
            p.zero_()
    constant = torch.randn(3, dtype=D).requires_grad_()
    student.denoiser.forward = lambda x_t, *rest: constant.expand_as(x_t)
    assert objective.student_loss(batch, student, 1).logs["bend"] == 0
    objective, student, batch = made(alignment=Alignment())
    assert objective.student_loss(batch, student, 1).logs["bend"] > 0.01


# ---- refusals


def test_what_cannot_be_drawn_is_refused():
    with refused("objective.schedule", "first time"):
        DMD2(
            teacher=predictor(1), student=Generator(predictor(3), (0.9, 0.5)), fake=predictor(2),
            schedule=RandomChains(high=0.9),
        )  # fmt: skip
    with refused("objective.schedule", "shortest"):
        made(schedule=RandomChains(), first_step=0.05)
    with refused("objective.share_samples", "places"):
        DMD2(
            teacher=predictor(1), student=Generator(predictor(3)), fake=predictor(2),
            schedule=RandomChains(), share_samples=True,
        )  # fmt: skip
    objective, *_ = made(schedule=RandomChains(2, 6), first_step=0.05)
    objective.check_batch((6, 3))
    with refused("train.batch", "first_step"):
        objective.check_batch((5, 3))
    for keys in ({"shortest": 5, "longest": 4}, {"low": 0.5, "high": 0.5}, {"low": 0.0}):
        with pytest.raises(ValueError, match=r"longest|low"):
            RandomChains(**keys)
    with pytest.raises(ValueError, match="low"):
        Alignment(low=0.9, high=0.1)
