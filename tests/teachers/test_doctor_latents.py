"""The doctor on latent models: each family is sound, and a mistake in a saved config is named."""

import json
import shutil

import pytest
import torch
from torch import nn
from torchvision.utils import save_image

from distill.planning.doctor import diagnose, pictures_for, verdict
from eval import shapes
from teachers import load
from teachers.denoiser import PREDICTIONS
from teachers.diagnosis.structure import denoising, subject_of
from teachers.families.stable_diffusion import StableDiffusion
from teachers.teacher import EMBEDDED
from tests.helpers import families
from tests.helpers.command_line import called
from tests.helpers.doctor import first_broken

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("sd2", "sdxl", "dit", "flux-dev", "wan")
        else pytest.param(name, marks=SLOW)
        for name in families.FAMILIES
    ],
)
def test_every_family_passes_on_structure(name, tmp_path):
    """The doctor finds nothing wrong with the structure of any family."""
    teacher = load(str(families.build(name, tmp_path)), **families.OPTIONS.get(name, {}))
    checks = diagnose(teacher, pictures_for(teacher, None), structure_only=True)
    assert {c.verdict for c in checks} == {"ok", "left out"}, first_broken(checks)
    assert verdict(checks) == "passed: 20 checks, 3 left out"


# A trained teacher of latents, with mistakes planted in its files.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures such as the embedded teacher was trained on, as files."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(drawings()):
        save_image(image / 2 + 0.5, folder / f"{i}.png")
    return folder


def drawings():
    return shapes.draw(shapes.all_captions()[::90], seed=1).float() / 127.5 - 1


def planted(folder, part="", **values):
    """A copy of the embedded teacher, with these values in the config of a part."""
    shutil.copytree(EMBEDDED["shapes"], folder)
    if part:
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def examined(capsys, source, pictures):
    """What the command says of the pictures: exit code, table, and the line of the mistake."""
    code, out, err = called(capsys, "doctor", source, "--image", pictures)
    assert err.count("\n") == (code == 2), err
    return code, out, err


@pytest.mark.slow
def test_a_sound_copy_passes_with_a_verdict_and_nothing_on_stderr(tmp_path, pictures, capsys):
    """The embedded teacher of shapes passes on its own pictures."""
    code, out, err = examined(capsys, planted(tmp_path / "t"), pictures)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "passed: 24 checks, 1 left out"


def test_a_wrong_prediction_type_in_the_config_is_named(tmp_path, pictures, capsys):
    source = planted(tmp_path / "t", "scheduler", prediction_type="epsilon")
    code, out, err = examined(capsys, source, pictures)
    assert code == 2
    assert "prediction_type: the config says epsilon, but v_prediction explains" in err
    assert "set prediction_type to v_prediction" in err
    assert out.splitlines()[-1].startswith("broken: 1 of 22 checks")


SCALE = json.loads((EMBEDDED["shapes"] / "vae" / "config.json").read_text())["scaling_factor"]


@pytest.mark.parametrize(("times", "gain"), [(0.5, "2"), pytest.param(2.0, "0.5", marks=SLOW)])
def test_a_wrong_scaling_factor_in_the_config_is_named(tmp_path, pictures, capsys, times, gain):
    """A scaling factor of half or twice its value is named, with the gain that mends it."""
    source = planted(tmp_path / "t", "vae", scaling_factor=SCALE * times)
    code, _, err = examined(capsys, source, pictures)
    assert code == 2 and "vae scaling_factor: data times" in err
    assert f"multiply scaling_factor by about {gain}\n" in err


def test_a_wrong_shift_factor_in_the_config_is_named(tmp_path, pictures, capsys):
    source = planted(tmp_path / "t", "vae", shift_factor=1.0)
    code, _, err = examined(capsys, source, pictures)
    assert code == 2 and "vae shift_factor: data plus " in err


# What a teacher of the user's own may get wrong: the time that its network is fed.

OWN = """
from teachers import load

def wrong():
    teacher = load({folder!r})
    teacher.denoiser.time = lambda t: {time}
    return teacher
"""


@pytest.mark.slow
@pytest.mark.parametrize("time", ["t", "999 * (1 - t)"])
def test_a_wrong_time_unit_in_an_adapter_is_named(tmp_path, pictures, capsys, time):
    """An adapter that gives its network times in another unit is named."""
    (tmp_path / "mine.py").write_text(OWN.format(folder=str(EMBEDDED["shapes"]), time=time))
    code, _, err = examined(capsys, f"{tmp_path / 'mine.py'}:wrong", pictures)
    assert code == 2 and "time units: fed with 1000 t the network does better" in err


# A flow model of latents.


class Flow(nn.Module):
    """The embedded teacher's network as one that predicts ε - x and reads 1000 σ.

    Exactly: x̂ is the same under every process once the input is rescaled to the same σ/α.
    """

    def __init__(self, v: nn.Module, process) -> None:
        super().__init__()
        self.v, self.process, self.config = v, process, v.config

    def forward(
        self, sample, timestep, encoder_hidden_states, return_dict=False, timestep_cond=None
    ):
        sigma = (timestep.double() / 1000).clamp(1e-4, 1 - 1e-4)  # the doctor tries wild times
        t = self.process.time(sigma / (1 - sigma)).clamp(0, 1)
        alpha, spread = self.process.at(t, sample)
        level = sigma.float().view(-1, 1, 1, 1)
        x_t = sample * torch.hypot(alpha, spread) / torch.hypot(1 - level, level)
        out = self.v(x_t, self.process.index(t).float(), encoder_hidden_states, return_dict=False)
        skip, gain = PREDICTIONS["v"](alpha, spread)
        x = skip * x_t + gain * out[0]
        return ((sample - x) / level,)


@pytest.fixture(autouse=True)
def _flows(monkeypatch):
    """Flow matching under this pipeline is refused, but its network is the smallest to train."""
    monkeypatch.setattr(StableDiffusion, "FLOWS", True)


def flow(folder, part="", **values):
    """A flow teacher whose folder says so, with these values in the config of a part."""
    old = load("shapes").denoiser
    where = planted(folder, part if part == "vae" else "", **(values if part == "vae" else {}))
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
              "shift": 3.0} | (values if part == "scheduler" else {})  # fmt: skip
    (where / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((where / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (where / "model_index.json").write_text(json.dumps(index))
    teacher = load(str(where))
    teacher.denoiser.backbone = Flow(old.backbone, old.process)
    return teacher


def said(teacher):
    """What the denoising errors alone say is wrong."""
    return first_broken(denoising(subject_of(teacher, drawings(), None, None)))


def test_a_sound_flow_model_passes(tmp_path):
    checks = list(denoising(subject_of(flow(tmp_path / "t"), drawings(), None, None)))
    assert {c.verdict for c in checks} == {"ok"}, first_broken(checks)
    assert checks[0].value < 0.3  # as the embedded teacher's own


@pytest.mark.parametrize(
    ("part", "values", "line"),
    [
        pytest.param(
            "scheduler", {"num_train_timesteps": 1},
            "time units: fed with 1000 σ/(α + σ) the network does better", marks=SLOW,
        ),
        ("vae", {"scaling_factor": SCALE / 2}, "multiply scaling_factor by about 2"),
        pytest.param("vae", {"shift_factor": 1.0}, "vae shift_factor: data plus ", marks=SLOW),
    ],
    ids=["time unit", "scale", "shift"],
)  # fmt: skip
def test_a_mistake_in_a_flow_models_configs_is_named(tmp_path, part, values, line):
    """Of a flow model's times and of its latents' scale and shift."""
    assert line in said(flow(tmp_path / "t", part, **values))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["v", "eps", "x"])
def test_a_flow_model_read_as_another_prediction_is_named(tmp_path, wrong):
    """A flow model read as one of v, ε or x is named."""
    teacher = flow(tmp_path / "t")
    teacher.denoiser.coefficients = PREDICTIONS[wrong]
    assert "but flow_prediction explains the network better" in said(teacher)
