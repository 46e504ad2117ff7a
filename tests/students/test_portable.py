"""Exported text parts: what version 4 of transformers looks for is there, and says the same."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer, Qwen2Tokenizer

from students.export.portable import make_portable
from teachers import load
from tests.helpers import families

TEXT = "a red circle, two boats on a lake"


@pytest.fixture
def exported(tmp_path):
    """A pipeline saved anew, the folder that it was loaded from, and the pipeline."""

    def save(name):
        teacher = load(str(families.build(name, tmp_path / "teacher")))
        pipe = teacher.codec.pipe
        pipe.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved", tmp_path / "teacher", pipe

    return save


def test_clip_text_weights_are_named_as_every_version_knows_them(exported):
    folder, origin, pipe = exported("sd")
    make_portable(folder, origin)
    names = load_file(folder / "text_encoder" / "model.safetensors").keys()
    assert names and all(name.startswith("text_model.") for name in names)
    assert "text_model.text_model" not in "".join(names)
    found, report = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = pipe.tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(found(ids)[0], pipe.text_encoder(ids)[0])


def test_a_clip_tokenizer_can_be_built_from_its_vocabularys_own_files(exported):
    folder, origin, pipe = exported("sd")
    make_portable(folder, origin)
    place = folder / "tokenizer"
    (place / "tokenizer.json").unlink(missing_ok=True)  # the only file that version 4 does not read
    assert {"vocab.json", "merges.txt"} <= {p.name for p in place.iterdir()}
    assert CLIPTokenizer.from_pretrained(place)(TEXT).input_ids == pipe.tokenizer(TEXT).input_ids


def test_special_tokens_are_listed_under_the_name_that_both_versions_know(exported):
    folder, origin, pipe = exported("qwen")
    make_portable(folder, origin)
    place = folder / "tokenizer"
    config = json.loads((place / "tokenizer_config.json").read_text())
    assert not isinstance(config.get("extra_special_tokens"), list)
    again = Qwen2Tokenizer.from_pretrained(place)
    assert again.all_special_tokens == pipe.tokenizer.all_special_tokens


def test_a_vocabulary_that_only_its_teacher_has_is_copied(exported):
    folder, origin, _ = exported("pixart-sigma")
    file = "spiece.model"
    (origin / "tokenizer" / file).write_bytes(b"sentencepiece's own form")
    make_portable(folder, origin)
    assert (folder / "tokenizer" / file).read_bytes() == b"sentencepiece's own form"


def test_what_is_complete_is_left_as_it_is(exported, tmp_path):
    folder, origin, _ = exported("sd")
    make_portable(folder, origin)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    make_portable(folder, origin)
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    shutil.rmtree(origin)
    make_portable(folder, tmp_path / "no" / "such")
