"""Text encoders and VAEs are on the device while they encode or decode, and at no other time."""

import pytest
import torch
from torch import nn

from distill.config.recipe import Recipe
from distill.data.encode import decoder_on, encoders_on
from distill.training import build
from teachers import load
from tests.helpers import families
from tests.helpers.engines import stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(families.build("sd", tmp_path_factory.mktemp("sd")))


def watched(teacher, monkeypatch):
    """A list that fills with the codec's networks as they are moved, called, and moved back."""
    seen = []

    def to(module, *args, **kwargs):
        seen.append((type(module).__name__, str(args[0])))
        return module

    for part in (teacher.codec.pipe.vae, teacher.codec.pipe.text_encoder):
        monkeypatch.setattr(type(part), "to", to)
    codec, decode = teacher.codec, teacher.codec.decode
    monkeypatch.setattr(codec, "decode", lambda x: (seen.append(("decode", len(x))), decode(x))[1])
    return seen


def test_for_pictures_the_vae_alone_comes_to_the_device_and_leaves_it(folder, monkeypatch):
    teacher = load(folder)
    seen = watched(teacher, monkeypatch)
    with pytest.raises(KeyError), decoder_on(teacher, torch.device("cuda", 3)):
        raise KeyError
    assert seen == [("AutoencoderKL", "cuda:3"), ("AutoencoderKL", "cpu")]


def test_for_encoding_both_come_and_both_leave(folder, monkeypatch):
    teacher = load(folder)
    seen = watched(teacher, monkeypatch)
    with encoders_on(teacher, torch.device("cuda", 3)):
        assert {where for _, where in seen} == {"cuda:3"} and len(seen) == 2
    assert {where for _, where in seen[2:]} == {"cpu"} and len(seen) == 4


def test_training_needs_no_encoder_and_grids_encode_their_prompts_once(
    folder, tmp_path, monkeypatch
):
    tree = {
        "teacher": {"source": folder, "guidance": 2},
        "objective": {"name": "dmd2"},
        "adapters": {"rank": 2},
        "train": {"steps": 2, "batch": 2, "sample_every": 0},
    }
    run = build.build(Recipe.check(tree), tmp_path / "run")
    pipe, engine = run.teacher.codec.pipe, run.engine
    read = []
    hook = pipe.text_encoder.register_forward_pre_hook(lambda module, args: read.append("text"))
    seen = watched(run.teacher, monkeypatch)
    data = stream(engine)
    engine.advance(data), engine.advance(data)
    data.close()
    assert (seen, read) == ([], [])
    home = {str(p.device) for m in (pipe.vae, pipe.text_encoder) for p in m.parameters()}
    assert home == {"cpu"}
    for _ in range(2):
        engine.sample()
        shown = [("decode", 1)] * len(engine.shown)
        assert seen == [("AutoencoderKL", "cpu"), *shown, ("AutoencoderKL", "cpu")]
        seen.clear()
    hook.remove()
    assert read == ["text"]
    assert isinstance(run.teacher.codec.vae, nn.Module)


@pytest.mark.parametrize(
    ("said", "where", "features"),
    [
        ({}, "cuda:1", "cuda"),
        ({"ACCELERATE_USE_CPU": "yes"}, "cpu", "cpu"),
        ({"ACCELERATE_USE_CPU": "1"}, "cpu", "cpu"),
        ({"ACCELERATE_USE_CPU": "false"}, "cuda:1", "cuda"),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:3"}, "cuda:3", "cuda"),
    ],
)
def test_networks_work_where_accelerate_would_put_them(said, where, features, monkeypatch):
    from distill.data import encode
    from eval.metrics import features as metrics

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for key in ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE"):
        monkeypatch.delenv(key, raising=False)
    for key, value in said.items():
        monkeypatch.setenv(key, value)
    assert (str(encode.device()), str(metrics.device())) == (where, features)
