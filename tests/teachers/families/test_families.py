"""Every family: the stock pipeline's own numbers, students trained, exported and read back."""

import json
import logging
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from students import schedulers
from students.export.folder import export, load_student, rehearse, request
from students.lora import Adapter
from teachers import load
from teachers.families.base import check_vocabulary, images_of
from teachers.families.pixart import PixArtSigma
from tests.helpers import families
from tests.helpers.disturbed import disturbed
from tests.helpers.refusals import refused


@pytest.mark.parametrize("name", families.FAMILIES)
@pytest.mark.parametrize("adapter", [None, Adapter(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("renoise", [True, False], ids=["renoise", "ode"])
def test_a_stock_pipeline_samples_the_student(folders, name, adapter, renoise):
    teacher = load(folders(name), **families.OPTIONS.get(name, {}))
    student = disturbed(schedulers.student(teacher, 4, None, renoise, adapter)).eval()
    rehearse(student, teacher)


def some(chosen):
    """These families in every run, the others in the slow one: each starts another process."""
    return [
        name if name in chosen else pytest.param(name, marks=pytest.mark.slow)
        for name in families.FAMILIES
    ]


@pytest.mark.parametrize("name", some({"sd"}))
def test_an_exported_student_is_read_back(folders, name, tmp_path):
    """Each family's exported student is read back and draws the same."""
    teacher = load(folders(name), **families.OPTIONS.get(name, {}))
    student = disturbed(schedulers.student(teacher, 2, None, True, Adapter(rank=4))).eval()
    export(student, teacher, tmp_path / "student", {})
    again, _ = load_student(tmp_path / "student")
    prompts = request(student, teacher)[0][:2]
    z, cond = torch.randn(2, *teacher.shape), teacher.codec.condition(prompts)
    torch.testing.assert_close(
        again.at(2)(z, cond, 1), student.at(2)(z, cond, 1), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", some({"sdxl"}))
def test_a_teacher_in_half_precision_is_rehearsed_and_exported(folders, name, tmp_path):
    """Each family in bf16: the rehearsal and the export."""
    teacher = load(folders(name), **families.OPTIONS.get(name, {}), precision="bf16")
    student = disturbed(schedulers.student(teacher, 2, None, True, Adapter(rank=4))).eval()
    rehearse(student, teacher)
    export(student, teacher, tmp_path / "student", {})


def test_pictures_that_a_pipeline_gives_as_numpys_are_read_as_those_of_torch():
    """As DiT's does before diffusers 0.41."""
    images, videos = torch.rand(2, 3, 4, 5), torch.rand(2, 7, 3, 4, 5)
    assert images_of({"images": images}) is images and images_of({"frames": videos}) is videos
    assert torch.equal(images_of({"images": images.permute(0, 2, 3, 1).numpy()}), images)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_weights_that_are_not_all_there_are_refused(folders, part, tmp_path):
    """Diffusers would leave them without values, transformers draw them at random."""
    copy = shutil.copytree(folders("sdxl"), tmp_path / "t")
    file = next((copy / part).glob("*.safetensors"))
    weights = load_file(file)
    name = sorted(weights)[3]
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    with refused("teacher '*/t'", "whole", name.split(".")[-1]):
        load(str(copy))


class Records(logging.Handler):
    """What a logger says."""

    def __init__(self, name):
        super().__init__()
        self.said, self.log = [], logging.getLogger(name)

    def emit(self, record):
        self.said.append(record.getMessage())

    def __enter__(self):
        self.log.addHandler(self)
        return self.said

    def __exit__(self, *error):
        self.log.removeHandler(self)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_missing_weights_file_is_said_once(folders, part, tmp_path):
    """Diffusers logs what it raises as well."""
    copy = shutil.copytree(folders("sd"), tmp_path / "t")
    next((copy / part).glob("*.safetensors")).unlink()
    with Records("diffusers.models.modeling_utils") as said:
        with refused("teacher '*/t'", "safetensors", part):
            load(str(copy))
        assert said == []
        kind = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
        with pytest.raises(OSError, match="no file named"):  # outside of us it still does
            kind.from_pretrained(copy / part, use_safetensors=True)
        assert said


@pytest.mark.parametrize("left", ["tokenizer_config.json", "vocab.json", "merges.txt"])
def test_a_tokenizer_without_its_vocabulary_is_refused(folders, left, tmp_path):
    """Transformers would make one that knows no word."""
    copy = shutil.copytree(folders("sdxl"), tmp_path / "t")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):  # which of them there are
        (copy / "tokenizer_2" / name).unlink(missing_ok=True)
    (copy / "tokenizer_2" / left).write_text("{}")
    with refused("teacher '*/t'", "tokenizer_2", "tokenizer.json"):
        load(str(copy))


@pytest.mark.parametrize(
    "files",
    [["tokenizer.json"], ["vocab.json", "merges.txt"], ["spiece.model"], ["tokenizer.model"],
     ["vocab.txt"]],
)  # fmt: skip
def test_every_form_that_vocabularies_are_saved_in_is_known(files, tmp_path):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_text("{}")
    with refused("teacher", "vocabulary"):
        check_vocabulary(tmp_path, "teacher")
    for name in files:
        (tmp_path / name).write_text("{}")
    check_vocabulary(tmp_path, "teacher")


@pytest.mark.parametrize("installed", [True, False])
def test_pixarts_pipeline_is_asked_to_clean_captions_where_it_can(installed, monkeypatch):
    """Else it warns, at every picture, that Beautiful Soup is not there."""
    for name in ("is_bs4_available", "is_ftfy_available"):
        monkeypatch.setattr(diffusers.utils, name, lambda: installed)
    arguments = PixArtSigma.arguments(["a cat"], (32, 32))
    assert arguments["clean_caption"] is installed
    monkeypatch.setattr(diffusers.utils, "is_ftfy_available", lambda: False)
    assert PixArtSigma.arguments(["a cat"], (32, 32))["clean_caption"] is False


def test_pixarts_pipeline_says_nothing_of_beautiful_soup(folders, monkeypatch):
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as stocks

    for module in (diffusers.utils, stocks):
        monkeypatch.setattr(module, "is_bs4_available", lambda: False)
    teacher = load(str(folders("pixart-sigma")))
    pipe = teacher.codec.pipe
    pipe.set_progress_bar_config(disable=True)
    with Records(stocks.__name__) as said:
        asked = teacher.codec.arguments(["a cat"])
        pipe(**asked, num_inference_steps=1, output_type="latent")
        assert said == []
        del asked["clean_caption"]
        pipe(**asked, num_inference_steps=1, output_type="latent")
        assert "Beautiful Soup" in said[0]


def test_an_index_with_an_empty_entry_is_refused(folders, tmp_path):
    copy = shutil.copytree(folders("sd"), tmp_path / "t")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "unet": []}))
    with refused("teacher '*/t'", "model_index.json"):
        load(str(copy))
