"""Fine-tuning on pictures: its loss, the anchor, and the states at which the anchor is taken."""

import torch

from distill.objectives.base import Batch
from distill.objectives.finetune import FineTuning, states
from students.generator import Generator
from teachers.denoiser import Guided
from teachers.process import Karras
from tests.helpers.toys import Slopes

PROCESS = Karras()
TIMES = torch.tensor([1.0, 0.5], dtype=torch.float64)


def slopes(first, second):
    """x̂ = k x_t at the two times of a student, in EDM's process with weight 1."""
    network = Slopes(TIMES, torch.tensor([first, second]), PROCESS)
    network.weight = lambda t: torch.ones_like(t)
    return network


def objective(now, before, **keys):
    return FineTuning(
        teacher=slopes(*before),
        student=Generator(slopes(*now), (1.0, 0.5)).keep(2),
        where="steps",
        **keys,
    )


def batch(n=4, x=0.0):
    noise = torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
    return Batch(torch.full((n, 3), x), noise)


def test_the_loss_on_pictures_is_the_networks_own_at_the_times_of_the_steps():
    """Of x = 0 and x̂ = k x_t, it is k² |x_t|² with x_t = σ ε, at both times equally often."""
    torch.manual_seed(3)
    loss = objective((0.5, 0.25), (0.0, 0.0)).loss(batch(4000), 0)
    sigmas = [PROCESS.scales(t)[1].item() for t in TIMES]
    expected = sum((k * s) ** 2 for k, s in zip((0.5, 0.25), sigmas, strict=True)) / 2
    assert abs(loss.value.item() / expected - 1) < 0.05
    assert set(loss.logs) == {"fit"}  # without an anchor nothing else is computed


def test_without_a_change_the_anchor_is_zero():
    loss = objective((0.5, 0.25), (0.5, 0.25), anchor=1.0).loss(batch(), 0)
    assert loss.logs["drift"].item() == 0
    assert loss.value.item() == loss.logs["fit"].item()


def test_the_anchor_is_the_squared_change_of_the_output_at_the_states_of_the_chain():
    """At the first place x_t is σ z, so the change of x̂ is (k − k') σ z."""
    one = Generator(slopes(0.5, 0.0), (1.0,))
    tuned = FineTuning(teacher=slopes(0.3, 0.0), student=one, where="steps", anchor=2.0)
    some = batch()
    loss = tuned.loss(some, 0)
    sigma = PROCESS.scales(TIMES[:1])[1].item()
    expected = (0.2 * sigma) ** 2 * some.noise.square().mean().item()
    assert abs(loss.logs["drift"].item() / expected - 1) < 1e-5
    total = loss.logs["fit"] + 2 * loss.logs["drift"]
    assert torch.allclose(loss.value, total)


def test_a_step_along_the_anchor_alone_returns_to_the_student_before():
    """Of the drift alone: a wrong sign would lead away."""
    tuned = objective((0.5, 0.25), (0.3, 0.4), anchor=1.0)
    loss = tuned.loss(batch(64), 0)
    loss.logs["drift"].backward()
    gradient = tuned.student.denoiser.slopes.grad
    assert gradient[0] > 0 and gradient[1] < 0  # both towards the teacher's slopes
    assert all(p.grad is None for p in tuned.teacher.parameters())


def test_states_are_the_inputs_of_the_students_own_steps():
    student = Generator(slopes(0.5, 0.25), (1.0, 0.5), renoise=False)
    z = batch().noise
    at = states(student, z, None, [0, 1, 0, 1])
    first = z * student.scale(z)
    assert torch.equal(at[[0, 2]], first[[0, 2]])
    assert torch.equal(at[[1, 3]], student.step(first, 0)[[1, 3]])


def test_of_known_items_the_teachers_output_is_learned_and_without_a_change_nothing():
    """Items 0 and 1 are new, 2 and 3 known. A known one's target is the teacher's k' x_t."""
    some = batch()._replace(items=torch.tensor([2, 0, 3, 1]))
    tuned = objective((0.5, 0.25), (0.5, 0.25), known_from=2)
    x_t, t = torch.randn(4, 3), torch.full((4,), 0.5)
    target = tuned.target(some, x_t, t)
    assert torch.equal(target[[1, 3]], torch.zeros(2, 3))
    assert torch.allclose(target[[0, 2]], 0.25 * x_t[[0, 2]])
    known = some._replace(items=torch.tensor([2, 3, 4, 5]))
    loss = tuned.loss(known, 0)
    loss.value.backward()
    assert loss.value.item() == 0
    assert tuned.student.denoiser.slopes.grad.abs().max() == 0
    other = objective((0.5, 0.25), (0.5, 0.25))
    assert torch.equal(other.target(known, x_t, t), known.data)  # unless the key is set


def test_some_known_items_lose_their_condition():
    """Of items 0 to 1999 the second half is known; 30 % of that half gets the null's entry, 9."""
    torch.manual_seed(0)
    items = torch.arange(2000)
    some = Batch(torch.zeros(2000, 3), torch.zeros(2000, 3), {"a": torch.ones(2000, 2)}, items)
    tuned = objective((0.5, 0.25), (0.5, 0.25), known_from=1000, drop=0.3)
    assert tuned.dropped(some) is some  # a teacher without guidance has no null
    tuned.teacher = Guided(tuned.teacher, 1.0, {"a": torch.full((1, 2), 9.0)})
    cond = tuned.dropped(some).cond["a"]
    assert (cond[:1000] == 1).all()
    assert abs((cond[1000:] == 9).all(1).float().mean() - 0.3) < 0.05
    assert ((cond == 9).all(1) | (cond == 1).all(1)).all()
