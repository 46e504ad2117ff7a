"""The doctor: a good adapter passes, and each wrong one is caught by the name of its mistake."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

from distill.planning import doctor
from distill.planning.doctor import diagnose, pictures_for
from eval import digits
from teachers import Guided, Teacher, load
from teachers.denoiser import PREDICTIONS, Network
from teachers.diagnosis.structure import (
    checks_of,
    conditions,
    dead_leaves,
    denoising,
    description,
    examine,
    outputs,
    round_trip,
    subject_of,
)
from teachers.process import Karras, Linear, Process, Tabulated
from teachers.teacher import Pixels
from tests.helpers.command_line import called
from tests.helpers.doctor import first_broken
from tests.helpers.refusals import refused


def evidence(teacher, data):
    """What the denoising errors alone say is wrong."""
    return first_broken(denoising(subject_of(teacher, *data, None)))


@pytest.fixture(scope="module")
def data():
    """Eighteen digits and their labels."""
    images, labels = digits.data()
    return images[::100], labels[::100].tolist()


@pytest.fixture
def teacher():
    return load("digits")


def test_the_embedded_teacher_passes_every_check(teacher, data):
    checks = diagnose(teacher, *data)
    assert {c.verdict for c in checks} == {"ok"}, first_broken(checks)
    assert len({c.name for c in checks}) == len(checks) >= 20


def test_a_norm_that_autocast_slows_down_is_no_warning(teacher, data, monkeypatch):
    def with_norm(*args, **more):
        x = torch.ones(2, 8, dtype=torch.bfloat16)
        torch.nn.functional.rms_norm(x, (8,), torch.ones(8))  # PyTorch warns of these types
        warnings.warn("another", stacklevel=1)
        return examine(*args, **more)

    monkeypatch.setattr(doctor, "examine", with_norm)
    with pytest.warns(UserWarning, match="another") as seen:
        diagnose(teacher, *data)
    assert not [w for w in seen if "Mismatch dtype" in str(w.message)]


class Other(Network):
    """The embedded network read in a process of one's own, by rules of one's own."""

    def __init__(self, inner, predicts=None, time=None):
        super().__init__(inner.backbone, inner.process, predicts or inner.coefficients)
        self.inner, self.time = inner, time or inner.time
        self.eval()

    def call(self, x_t, t, cond, s):
        _, sigma = self.process.at(t, x_t)
        x_t = x_t / (sigma**2 + 0.25).sqrt()
        return self.backbone(x_t, self.time(t), cond["class_labels"], return_dict=False)[0]


@pytest.mark.parametrize("predicts", ["eps", "v", "flow"])
def test_a_wrong_prediction_type_is_named_with_the_right_one(teacher, data, predicts):
    line = evidence(replace(teacher, denoiser=Other(teacher.denoiser, predicts)), data)
    assert line.startswith("prediction_type: the config says ")
    assert "but EDM's F explains the network better (error " in line


@pytest.mark.parametrize("units", [lambda t: 1000 * t, lambda t: 1 - t])
def test_a_wrong_time_unit_is_named_with_the_right_one(teacher, data, units):
    line = evidence(replace(teacher, denoiser=Other(teacher.denoiser, None, units)), data)
    assert line.startswith("time units: fed with ¼ log σ/α the network does better (error ")


class Scaled(Pixels):
    """A codec of latents: pixels less a shift, times a scale."""

    def __init__(self, shift=0.0, scale=1.0):
        super().__init__(10, 10)
        self.shift, self.scale = shift, scale

    def encode(self, images):
        return (images - self.shift) * self.scale

    def decode(self, latents):
        return latents / self.scale + self.shift


@pytest.mark.parametrize(("scale", "gain"), [(5.5, "0.18"), (0.3, "3")])
def test_a_wrong_latent_scale_is_named_with_what_mends_it(teacher, data, scale, gain):
    line = evidence(replace(teacher, codec=Scaled(0.0, scale)), data)
    assert line.startswith("vae scaling_factor: data times ")
    assert f"multiply scaling_factor by about {gain}" in line


@pytest.mark.parametrize(("shift", "sign"), [(0.7, "plus"), (-0.7, "less")])
def test_a_wrong_shift_is_named_with_its_direction(teacher, data, shift, sign):
    line = evidence(replace(teacher, codec=Scaled(shift)), data)
    assert line.startswith(f"vae shift_factor: data {sign} 0.")


def test_a_codec_whose_ways_differ_is_named(teacher, data):
    class Lopsided(Scaled):
        def decode(self, latents):
            return latents

    line = first_broken(round_trip(subject_of(replace(teacher, codec=Lopsided(0.4)), *data, None)))
    assert line.startswith("vae scaling_factor/shift_factor: decode does not undo encode")


def test_flipped_guidance_is_caught(teacher, data):
    def flipped(x, negative, scale):
        return x + scale * (negative - x)

    guided = Guided(teacher.denoiser, 3.0, teacher.codec.null, flipped)
    checks = list(conditions(subject_of(teacher, *data, guided)))
    assert checks[-1].value == pytest.approx(-2, abs=1e-4)
    assert first_broken(checks).startswith("guidance: it moves towards null and not away")


def test_labels_that_are_off_by_one_are_caught(teacher, data):
    class Off(Pixels):
        def condition(self, prompts):
            return super().condition([(p + 1) % 10 for p in prompts])

    line = first_broken(description(subject_of(replace(teacher, codec=Off(10, 10)), *data, None)))
    assert line.startswith("codec.condition and codec.null") and "off by one" in line


def test_a_condition_that_is_not_passed_on_is_caught(teacher, data):
    class Deaf(Other):
        def call(self, x_t, t, cond, s):
            return super().call(x_t, t, {"class_labels": torch.full((len(t),), 10)}, s)

    wrong = replace(teacher, denoiser=Deaf(teacher.denoiser))
    line = first_broken(conditions(subject_of(wrong, *data, None)))
    assert line.startswith("call(): x̂ is the same with the condition and without")


def test_what_mixes_a_batch_detaches_or_draws_is_caught(teacher, data):
    class Mixing(Other):
        def call(self, x_t, t, cond, s):
            return super().call(x_t, t, cond, s) + x_t.mean()

    class Detached(Other):
        @torch.no_grad()
        def call(self, x_t, t, cond, s):
            return super().call(x_t, t, cond, s)

    class Sampler(Other):
        def call(self, x_t, t, cond, s):
            return super().call(x_t, t, cond, s) + torch.randn_like(x_t)

    class Raising(Other):
        def call(self, x_t, t, cond, s):
            raise KeyError("text_embeds")

    found = {
        kind.__name__: first_broken(
            examine(replace(teacher, denoiser=kind(teacher.denoiser)), *data, structure_only=True)
        )
        for kind in (Mixing, Detached, Sampler, Raising)
    }
    assert found["Mixing"].startswith("call(): a sample's x̂ changes with the others")
    assert found["Detached"].startswith("call(): something in it detaches")
    assert found["Sampler"].startswith("call(): two calls differ")
    assert found["Raising"].startswith("outputs: the adapter raised KeyError: 'text_embeds'")


def test_a_half_precision_x_is_caught(teacher, data):
    class Half(Other):
        def forward(self, x_t, t, cond=None, s=None):
            return super().forward(x_t, t, cond, s).bfloat16()

    line = first_broken(
        outputs(subject_of(replace(teacher, denoiser=Half(teacher.denoiser)), *data, None))
    )
    assert line.startswith("call(): x̂ is torch.bfloat16; convert")


class Reversed(Linear):
    def scales(self, t):
        return t, 1 - t


class Narrow(Karras):
    def __init__(self):
        super().__init__(0.002, 2.0)


class Inexact(Linear):
    def time(self, ratio):
        return ratio / (1 + 2 * ratio)


class Backwards(Linear):
    def velocity(self, x_t, x, t):
        return -super().velocity(x_t, x, t)


@pytest.mark.parametrize(
    ("process", "line"),
    [
        (Reversed(), "t = 0 must be data, and α is 0"),
        (Narrow(), "t = 1 must be noise, and σ/α is 2"),
        (Inexact(), "process.time: it must give the t"),
        (Backwards(), "process.velocity: it is not the slope"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, Process) else "",
)
def test_a_wrong_clock_is_caught(teacher, data, process, line):
    wrong = Other(teacher.denoiser)
    wrong.process = process
    assert line in first_broken(
        examine(replace(teacher, denoiser=wrong), *data, structure_only=True)
    )


@pytest.mark.parametrize(
    "process", [Linear(), Karras(), Tabulated.linear(), Tabulated.scaled_linear()], ids=repr
)
def test_every_published_clock_passes(process):
    from teachers.diagnosis.structure import clocks

    assert first_broken(checks_of("process", lambda: clocks(process))) == ""


@pytest.mark.parametrize("kind", ["edm", "cm", "eps", "v", "sample", "unconditional"])
def test_random_weights_pass_on_structure_and_are_else_called_untrained(pipelines, kind):
    teacher = load(str(pipelines[kind]), **({"null_label": 10} if kind == "edm" else {}))
    images = dead_leaves(4, 1, (8, 8))
    checks = diagnose(teacher, images, structure_only=True)
    assert {c.verdict for c in checks} <= {"ok", "left out"}, first_broken(checks)
    if kind in ("edm", "eps"):
        verdicts = [c.verdict for c in examine(teacher, images)]
        assert verdicts.count("untrained?") == 1 and "broken" not in verdicts


@pytest.mark.parametrize("name", ["gaussian", "ring", "two-modes"])
def test_teachers_in_closed_form_pass(name):
    teacher = load(f"analytic:{name}")
    checks = diagnose(teacher, pictures_for(teacher, None))
    assert {c.verdict for c in checks} <= {"ok", "left out"}, first_broken(checks)


def test_a_network_with_a_state_is_not_sampled_as_it_is_trained(teacher, data):
    class Remembering(Other):
        def call(self, x_t, t, cond, s):
            return super().call(x_t, t, cond, s) * (2.0 if torch.is_grad_enabled() else 1.0)

    line = first_broken(
        diagnose(replace(teacher, denoiser=Remembering(teacher.denoiser)), *data, True)
    )
    assert line.startswith("call(): a student's chain differs between training and sampling")


def test_drawn_pictures_are_the_same_each_time_and_in_range():
    a, b = dead_leaves(2, 3, (16, 24)), dead_leaves(2, 3, (16, 24))
    assert torch.equal(a, b) and a.shape == (2, 3, 16, 24)
    assert a.abs().max() <= 1 and not torch.equal(a[0], a[1])
    assert 0.3 < a.std() < 0.8


OWN = """
from teachers import Teacher, load
from teachers.denoiser import Network

class Mine(Network):
    def call(self, x_t, t, cond, s):
        return self.inner.call(x_t, t, cond, s)

def good():
    digits = load("digits")
    mine = Mine(digits.denoiser.backbone, digits.denoiser.process, digits.denoiser.coefficients)
    mine.inner = digits.denoiser
    return Teacher(mine, digits.codec, digits.shape)

def wrong():
    teacher = good()
    teacher.denoiser = Mine(teacher.denoiser.backbone, teacher.denoiser.process, "eps")
    teacher.denoiser.inner = load("digits").denoiser
    return teacher

def nothing():
    return 3

def fails():
    raise RuntimeError("no weights")
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    return tmp_path / "mine.py"


def test_a_teacher_of_ones_own_is_loaded_frozen(own):
    teacher = load(f"{own}:good")
    assert isinstance(teacher, Teacher) and teacher.source == f"{own}:good"
    assert not any(p.requires_grad for p in teacher.denoiser.parameters())


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("goood", ("teacher '*/mine.py:goood'", "goood", "good")),
        ("nothing", ("teacher '*/mine.py:nothing'", "Teacher")),
        ("fails", ("teacher '*/mine.py:fails'", "RuntimeError")),
    ],
)
def test_a_mistaken_function_is_one_line(own, name, line):
    with refused(*line):
        load(f"{own}:{name}")


def test_the_command_prints_a_table_and_exits_with_the_remedy(own, tmp_path, capsys, data):
    from torchvision.utils import save_image

    folder = tmp_path / "digits"
    folder.mkdir()
    for i, image in enumerate(data[0]):
        save_image(image / 2 + 0.5, folder / f"{i:02}.png")
    report = tmp_path / "report.json"
    code, out, err = called(capsys, "doctor", f"{own}:wrong", "--image", folder, "--json", report)
    assert code == 2
    assert "prediction_type: the config says epsilon, but EDM's F explains" in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert "promise" in out and "denoising" in out
    checks = json.loads(report.read_text())["checks"]
    assert [c["verdict"] for c in checks].count("broken") == 1
    code, out, err = called(capsys, "doctor", f"{own}:good", "--structure-only")
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["digits", "--image", "nowhere.png"], "--image nowhere.png: no such file"),
        (["nowhere.py:f"], "no such file in "),
        (["digist"], "no such folder"),
        (["digits", "--prompt", "eleven"], "labels"),
    ],
)
def test_a_mistaken_command_is_one_line(capsys, words, line):
    code, _, err = called(capsys, "doctor", *words)
    assert code == 2 and line in err and err.count("\n") == 1


def test_every_prediction_has_its_published_name():
    from teachers.diagnosis.evidence import PUBLISHED

    assert PUBLISHED.keys() >= PREDICTIONS.keys()
