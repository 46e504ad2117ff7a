"""Fine-tuning on pictures: its loss, the anchor, and the states at which the anchor is taken."""

import torch

from distill.objectives.base import Batch
from distill.objectives.distribution.anchored import AnchoredDMD2
from distill.objectives.finetune import FineTuning, states
from students.generator import Generator
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


def test_the_anchor_holds_known_items_alone():
    """One chain place, so that the drift of a held sample is (0.2 σ)² |z|², of others 0."""
    one = Generator(slopes(0.5, 0.0), (1.0,))
    tuned = FineTuning(
        teacher=slopes(0.3, 0.0), student=one, where="steps", anchor=1.0, known_from=2
    )
    some = batch()._replace(items=torch.tensor([2, 0, 3, 1]))
    sigma = PROCESS.scales(TIMES[:1])[1].item()
    held = some.noise[[0, 2]].square().mean(1).sum().item() / 4
    drift = tuned.loss(some, 0).logs["drift"].item()
    assert abs(drift / ((0.2 * sigma) ** 2 * held) - 1) < 1e-5


# ---- DMD2 with the same anchor


def anchored(**keys):
    student = Generator(slopes(0.5, 0.25), (1.0, 0.5)).keep(2)
    teacher, fake = slopes(0.2, 0.1), slopes(0.6, 0.3)
    return AnchoredDMD2(teacher=teacher, student=student, fake=fake, **keys)


def numbered(items):
    some = batch(len(items))
    return some._replace(x=None, items=torch.tensor(items))


def test_a_students_own_output_before_is_kept_where_items_are_known():
    objective = anchored(known_from=2, anchor=3.0)
    loss = objective.student_loss(numbered([2, 3, 5, 9]), objective.student)
    assert loss.value.item() == 0 and loss.logs["matching"].item() == 0
    with torch.no_grad():
        objective.student.denoiser.slopes += torch.tensor([0.1, -0.2])
    loss = objective.student_loss(numbered([2, 3, 5, 9]), objective.student)
    assert loss.logs["drift"] > 0 and torch.isclose(loss.value, 3 * loss.logs["drift"])
    loss.value.backward()
    gradient = objective.student.denoiser.slopes.grad
    assert gradient[0] > 0 and gradient[1] < 0  # back to where it was
    assert all(p.grad is None and not p.requires_grad for p in objective.before.parameters())


def test_new_items_are_matched_as_by_dmd2_and_each_kind_counts_by_its_share():
    objective = anchored(known_from=2, anchor=3.0)
    plain = anchored()
    new = numbered([0, 1, 0, 1])
    torch.manual_seed(5)
    mine = objective.student_loss(new, objective.student)
    torch.manual_seed(5)
    assert torch.equal(mine.value, plain.student_loss(new, plain.student).value)
    with torch.no_grad():
        objective.student.denoiser.slopes += 0.1
    loss = objective.student_loss(numbered([0, 2, 3, 4]), objective.student)
    expected = 0.25 * loss.logs["matching"] + 0.75 * 3 * loss.logs["drift"]
    assert torch.allclose(loss.value, expected)


def test_without_known_items_it_is_dmd2():
    some = numbered([0, 1, 2, 3])
    values = []
    for objective in (anchored(), anchored(known_from=9)):
        torch.manual_seed(5)
        values.append(objective.student_loss(some, objective.student).value.item())
    assert values[0] == values[1]
