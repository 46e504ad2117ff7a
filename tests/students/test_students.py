import json
import random
import subprocess

import pytest
import torch
from torch import nn

from students import Critic, Generator, schedulers
from students.export import folder as exporting
from students.export.folder import (
    ExportError,
    export,
    load_student,
    pixel_difference,
    rehearse,
    sample_student,
    verify,
)
from teachers import Karras, load
from teachers.analytic import Gaussian
from teachers.process import Tabulated
from teachers.storage.diffusers_config import log_sigma
from tests.helpers.refusals import refused
from tests.helpers.toys import Affine


def affine():
    return Affine(torch.zeros(2), torch.eye(2) * 0.5)


def test_one_step_is_the_denoiser_at_pure_noise():
    student, z = Generator(affine()), torch.randn(4, 2)
    torch.testing.assert_close(student(z), 0.5 * z)


def test_gradients_flow_through_the_last_step_only():
    network, z = affine(), torch.randn(4, 2, requires_grad=True)
    Generator(network, (1.0, 0.5))(z).sum().backward()
    assert z.grad is None or not z.grad.any()
    assert network.r.grad.any()


def test_returning_along_the_ode_is_ddim():
    teacher, times = Gaussian(torch.zeros(2), torch.ones(2)), (1.0, 0.6, 0.3)
    z = torch.randn(4, 2)
    x_t = 80 * z
    for t, s in zip(times, times[1:]):
        t, s = torch.full((4,), t), torch.full((4,), s)
        x_t = teacher.process.step(x_t, teacher(x_t, t), t, s)
    expected = teacher(x_t, torch.full((4,), 0.3))
    torch.testing.assert_close(Generator(teacher, times, renoise=False)(z), expected)


def test_renoising_tops_up_what_the_floor_left():
    process = Karras(0.5, 80.0)
    seen = []

    class Spy(Affine):
        def forward(self, x_t, t, cond=None, s=None):
            seen.append(x_t)
            return torch.zeros_like(x_t)

    network = Spy(torch.zeros(2), torch.eye(2), process)
    noises = [torch.ones(4, 2)]
    Generator(network, (1.0, 0.5), floor=0.5)(torch.randn(4, 2), noises=noises)
    sigma = process.scales(torch.tensor(0.5, dtype=torch.double))[1].item()
    torch.testing.assert_close(seen[1], torch.full((4, 2), (sigma**2 - 0.25) ** 0.5))


def test_fewer_steps_are_a_subset_of_the_times():
    student = Generator(affine(), (1.0, 0.8, 0.5, 0.2))
    assert student.counts == (1, 2, 4)
    assert student.at(2).times == (1.0, 0.5)
    assert student.at(1).times == (1.0,)
    with pytest.raises(ValueError, match="runs in"):
        student.at(3)


def test_a_prefix_of_the_times_stops_early():
    network, z = affine(), torch.randn(4, 2)
    torch.testing.assert_close(Generator(network, (1.0, 0.5))(z, steps=1), Generator(network)(z))


@pytest.mark.parametrize("first", [0, 3])
def test_a_rollout_has_each_place_of_the_chain_as_it_is_sampled(first):
    teacher = Gaussian(torch.zeros(2), torch.ones(2))
    student = Generator(teacher, (1.0, 0.8, 0.5, 0.2), renoise=False)
    z = torch.randn(10, 2)
    x = student.rollout(z, first=first)
    places = sorted(((first + i) % 4 for i in range(10)), reverse=True)  # the furthest come first
    for one, noise, place in zip(x, z, places):
        torch.testing.assert_close(one, student(noise[None], steps=place + 1)[0])


def test_a_rollout_spends_as_much_on_each_place_and_no_more_than_it_must():
    called = []

    class Spy(Affine):
        def forward(self, x_t, t, cond=None, s=None):
            called.append((len(t), sorted(set(t.tolist())), torch.is_grad_enabled()))
            torch.testing.assert_close(cond["label"], labels[: len(t)])
            return super().forward(x_t, t)

    labels = torch.arange(8)
    student = Generator(Spy(torch.zeros(2), torch.eye(2)), (1.0, 0.75, 0.5, 0.25))
    student.rollout(torch.randn(8, 2), {"label": labels})
    assert called == [
        (6, [1.0], False),
        (4, [0.75], False),
        (2, [0.5], False),
        (8, [0.25, 0.5, 0.75, 1.0], True),
    ]


def test_a_rollouts_gradients_flow_through_each_samples_last_step_only():
    network, z = affine(), torch.randn(4, 2, requires_grad=True)
    Generator(network, (1.0, 0.5)).rollout(z).sum().backward()
    assert not z.grad[:2].any()  # the second step's
    assert z.grad[2:].all()
    assert network.r.grad.any()


def test_counts_are_drawn_by_their_weights_and_places_alike():
    student = Generator(affine(), (1.0, 0.8, 0.5, 0.2))
    random.seed(0)

    def shares(n=8000):
        drawn = [(len(g.times), first) for g, first in (student.sample_chain() for _ in range(n))]
        return {k: drawn.count(k) / n for k in set(drawn)}

    found = shares()  # every place of the three chains alike: one of seven
    assert set(found) == {(n, first) for n in (1, 2, 4) for first in range(n)}
    assert all(abs(v - 1 / 7) < 0.02 for v in found.values())
    student.keep(1, 4, weights=(3.0, 1.0))
    found = shares()
    assert abs(found[1, 0] - 3 / 4) < 0.02
    assert all(abs(found[4, first] - 1 / 16) < 0.02 for first in range(4))
    student.keep(4)
    assert set(shares(100)) == {(4, first) for first in range(4)}


def test_times_must_fall():
    with pytest.raises(ValueError, match="must decrease"):
        Generator(affine(), (0.5, 1.0))


# ---- stock forms


@pytest.mark.parametrize("kind", ["edm", "cm", "eps", "v"])
def test_a_student_starts_as_its_teacher(pipelines, kind):
    teacher = load(str(pipelines[kind]), **({"null_label": 10} if kind == "edm" else {}))
    student = schedulers.student(teacher, steps=2).denoiser
    x, cond = torch.randn(3, 1, 8, 8), teacher.codec.condition([1, 2, 3])
    for level in (0.5, 0.75, 1.0):  # lower, the consistency boundary makes them differ
        t = torch.full((3,), level)
        x_t = x * teacher.denoiser.process.at(t, x)[1]
        torch.testing.assert_close(
            student(x_t, t, cond), teacher.denoiser(x_t, t, cond), atol=2e-3, rtol=2e-3
        )


def test_retiming_keeps_what_the_embedded_teacher_says_at_every_time():
    before, after = load("digits").denoiser, load("digits").denoiser.backbone
    new = log_sigma(before.process, 250.0)
    schedulers.retime(after, before.time, new)
    t = torch.linspace(0, 1, 256)
    x, labels = torch.randn(256, 1, 8, 8), torch.arange(256) % 10
    with torch.no_grad():
        gap = after(x, new(t), labels).sample - before.backbone(x, before.time(t), labels).sample
    assert gap.abs().max() < 2e-5


@pytest.mark.parametrize("kind", ["edm", "cm"])
def test_an_edm_student_is_the_identity_at_its_floor(pipelines, kind):
    student = schedulers.student(load(str(pipelines[kind])), 1).denoiser
    x = torch.randn(2, 1, 8, 8)
    cond = {"class_labels": torch.tensor([0, 1])}
    torch.testing.assert_close(student(x, torch.zeros(2), cond), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_a_ddpm_students_boundary_is_lcms(pipelines, kind):
    """c_skip x_t + c_out x̂ at index i, by 0.5 and 10 i (arXiv:2310.04378, section 4)."""
    teacher = load(str(pipelines[kind]))
    student = schedulers.student(teacher, 2).denoiser
    x_t, cond = torch.randn(5, 1, 8, 8), teacher.codec.condition([1, 2, 3, 4, 5])
    index = torch.tensor([0.0, 1.0, 2.0, 5.0, 999.0])
    t, scaled = index / 999, (10 * index).view(-1, 1, 1, 1)
    x, size = teacher.denoiser(x_t, t, cond), (scaled**2 + 0.5**2).sqrt()
    expected = 0.5**2 / size**2 * x_t + scaled / size * x
    torch.testing.assert_close(student(x_t, t, cond), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("kind", "renoise"), [("edm", True), ("eps", True), ("eps", False)])
def test_a_students_times_are_its_schedulers_at_every_count(pipelines, kind, renoise, steps):
    if not renoise and 1000 % steps:
        pytest.skip("refused")
    student = schedulers.student(load(str(pipelines[kind])), steps, None, renoise)
    process, scheduler = student.denoiser.process, schedulers.scheduler(student)
    for count in student.counts:
        scheduler.set_timesteps(count)
        theirs = torch.as_tensor(scheduler.timesteps, dtype=torch.double)
        times = torch.tensor(student.at(count).times, dtype=torch.double)
        if isinstance(process, Tabulated):
            ours = process.index(times)
        else:
            ours = 250 * process.scales(times)[1].log()
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-9)


@pytest.mark.parametrize("start", [None, 2.5])
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_edms_ode_students_walk_their_schedulers_times(pipelines, steps, start):
    student = schedulers.student(load(str(pipelines["edm"])), steps, start, False)
    assert student.counts == (steps,)
    scheduler = schedulers.scheduler(student)
    scheduler.set_timesteps(steps)
    sigma = student.denoiser.process.scales(torch.tensor(student.times).double())[1]
    torch.testing.assert_close(sigma.float(), scheduler.sigmas[:-1], rtol=1e-6, atol=0)
    even = sigma ** (1 / 7)  # and the last step is as long as the others, down to EDM's 0.002
    gaps = torch.cat([even, torch.tensor([0.002 ** (1 / 7)]).double()]).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(steps))
    assert student.start == pytest.approx(scheduler.init_noise_sigma)


def test_edms_ode_student_starts_as_its_teacher_bit_for_bit(pipelines):
    teacher = load(str(pipelines["edm"]), null_label=10)
    student = schedulers.student(teacher, 2, renoise=False).denoiser
    x, cond = torch.randn(3, 1, 8, 8), teacher.codec.condition([1, 2, 3])
    t = torch.tensor([0.1, 0.5, 1.0])
    assert torch.equal(student(x, t, cond), teacher.denoiser(x, t, cond))


def test_a_student_may_start_below_the_highest_noise(pipelines):
    student = schedulers.student(load(str(pipelines["edm"])), 2, 2.5)
    scheduler = schedulers.scheduler(student)
    assert scheduler.config.sigma_max == pytest.approx(2.5)
    scheduler.set_timesteps(2)
    theirs = torch.as_tensor(scheduler.timesteps)
    ours = 250 * student.denoiser.process.scales(torch.tensor(student.times).double())[1].log()
    torch.testing.assert_close(ours, theirs.double(), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("cm", {"renoise": False, "steps": 2}, ("student.renoise",)),
        ("edm", {"start": 500.0}, ("student.start",)),
        ("edm", {"steps": 0}, ("student.steps", "1", "40", "0")),
        ("eps", {"start": 2.5}, ("student.start",)),
        ("eps", {"steps": 3, "renoise": False}, ("student.steps", "3", "1000")),
    ],
)
def test_what_no_stock_scheduler_samples_is_refused(pipelines, kind, options, says):
    with refused(*says):
        schedulers.student(load(str(pipelines[kind])), **options)


def test_an_analytic_teacher_has_no_weights_to_start_from():
    with refused("student", "weights"):
        schedulers.student(load("analytic:ring"))


# ---- export


@pytest.mark.parametrize(
    ("kind", "steps", "renoise"),
    [
        ("edm", 4, True),
        ("edm", 4, False),
        pytest.param("v", 2, True, marks=pytest.mark.slow),
        pytest.param("unconditional", 2, False, marks=pytest.mark.slow),
    ],
)
def test_stock_diffusers_in_another_process_draws_the_students_pictures(
    pipelines, tmp_path, kind, steps, renoise
):
    """Students of v-prediction and without labels, drawn by stock diffusers in another process."""
    teacher = load(str(pipelines[kind]), **({"null_label": 10} if kind == "edm" else {}))
    student = schedulers.student(teacher, steps, None, renoise)
    with torch.no_grad():  # no longer the teacher
        for p in student.parameters():
            p.add_(0.05 * torch.randn_like(p))
    export(student, teacher, tmp_path / "student", {"objective": {"name": "none"}})  # compares
    again, itself = load_student(tmp_path / "student")
    assert again.counts == student.counts
    labels = [1, 2, 3]
    torch.testing.assert_close(
        sample_student(again, itself, labels, 7),
        sample_student(student, teacher, labels, 7),
        atol=1e-5,
        rtol=1e-4,
    )


def test_an_export_that_differs_is_refused_and_leaves_nothing(pipelines, tmp_path):
    teacher = load(str(pipelines["edm"]), null_label=10)
    student = schedulers.student(teacher, 1)
    export(student, teacher, tmp_path / "student", {})
    other = schedulers.student(teacher, 1)
    with torch.no_grad():
        other.denoiser.backbone.conv_in.weight.add_(0.1)
    with pytest.raises(ExportError, match="differs"):
        verify(tmp_path / "student", other, teacher)
    assert [p.name for p in tmp_path.iterdir()] == ["student"]  # no drafts


@pytest.mark.slow
def test_exports_are_compared_without_tf32(pipelines, tmp_path, monkeypatch):
    """TF32 would tell a merged adapter from one beside its weights, on a GPU."""
    teacher = load(str(pipelines["edm"]), null_label=10)
    student, allowed = schedulers.student(teacher, 1), []
    drawn, run = exporting.pictures, subprocess.run

    def pictures(*args):
        allowed.append(torch.backends.cudnn.allow_tf32)
        return drawn(*args)

    def child(*args, env, **options):
        allowed.append(env["NVIDIA_TF32_OVERRIDE"] != "0")
        return run(*args, env=env, **options)

    monkeypatch.setattr(exporting, "pictures", pictures)
    monkeypatch.setattr(exporting.subprocess, "run", child)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    export(student, teacher, tmp_path / "student", {})
    rehearse(student, teacher)
    assert allowed and not any(allowed)
    assert torch.backends.cudnn.allow_tf32


def test_one_pixel_that_differs_fails_an_export(pipelines):
    student = schedulers.student(load(str(pipelines["edm"]), null_label=10), 1)
    ours = torch.rand(3, 1, 8, 8)
    theirs = ours.clone()
    theirs[1, 0, 2, 5] += 5e-4  # rounding
    assert pixel_difference(ours, theirs, student) == ""
    theirs[1, 0, 2, 5] += 5e-3
    assert "differs from the student by 0.005" in pixel_difference(ours, theirs, student)


def test_pictures_do_not_depend_on_the_batch_size(pipelines):
    teacher = load(str(pipelines["edm"]), null_label=10)
    student = schedulers.student(teacher, 2)
    whole = sample_student(student, teacher, list(range(10)), 0)
    torch.testing.assert_close(sample_student(student, teacher, list(range(10)), 0, batch=3), whole)


# ---- critic


def critic(pipelines, blocks=("backbone.mid_block",)):
    teacher = load(str(pipelines["edm"]), null_label=10)
    fake = teacher.denoiser.requires_grad_(True)
    return fake, Critic(fake, teacher.shape, teacher.codec.condition([0]), blocks)


def inputs():
    return torch.randn(3, 1, 8, 8), torch.rand(3), {"class_labels": torch.tensor([1, 2, 3])}


def test_a_critic_gives_a_logit_for_each_sample_and_owns_only_its_heads(pipelines):
    fake, judge = critic(pipelines, ("backbone.down_blocks.0", "backbone.mid_block")[1:])
    assert judge(*inputs()).shape == (3,)
    mine = {id(p) for p in judge.parameters()}
    assert not mine & {id(p) for p in fake.parameters()}


def test_a_critic_runs_no_further_than_its_last_block(pipelines):
    fake, judge = critic(pipelines)
    ran = []
    for name in ("mid_block", "up_blocks"):
        for m in nn.ModuleList([getattr(fake.backbone, name)]).modules():
            m.register_forward_hook(lambda *_, name=name: ran.append(name))
    judge(*inputs())
    assert "mid_block" in ran
    assert "up_blocks" not in ran


def test_critic_gradients_reach_its_input_and_the_features_it_reads(pipelines):
    fake, judge = critic(pipelines)
    x, t, cond = inputs()
    judge(x.requires_grad_(), t, cond).sum().backward()
    assert x.grad.any()
    assert fake.backbone.conv_in.weight.grad.any()
    assert fake.backbone.conv_out.weight.grad is None


def test_a_block_that_does_not_exist_is_named(pipelines):
    with refused("critic.blocks", "backbone.middle"):
        critic(pipelines, ("backbone.middle",))


@pytest.mark.parametrize("steps", [[True], ["2"], [], 2, None])
def test_steps_that_are_no_counts_are_damage(tmp_path, steps):
    text = json.dumps({"steps": steps, "renoise": True, "options": {}})
    (tmp_path / "fewstep.json").write_text(text)
    with refused("student '*'", "fewstep.json"):
        load_student(tmp_path)
