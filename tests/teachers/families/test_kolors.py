"""Kolors, SDXL's network on ChatGLM: the stock pipeline's inputs and pictures."""

from __future__ import annotations

import json

import pytest
import torch

from students import schedulers
from students.export.folder import export, load_student, rehearse
from students.lora import Adapter
from teachers import load
from tests.helpers import families_c
from tests.helpers.disturbed import disturbed
from tests.helpers.refusals import refused
from tests.helpers.stock_calls import check


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("sentencepiece")
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("kolors")
    families_c.kolors(root)
    return root


def test_the_network_is_fed_as_its_pipeline_feeds_it(folder, monkeypatch):
    teacher = load(str(folder))
    told = check(teacher, 16, 32, monkeypatch)
    assert told[".added_cond_kwargs.time_ids"].tolist() == [[16, 32, 0, 0, 16, 32]] * 2


@pytest.mark.parametrize("adapter", [None, Adapter(rank=4)], ids=["full", "lora"])
def test_a_stock_pipeline_samples_the_student(folder, adapter):
    teacher = load(str(folder))
    student = schedulers.student(teacher, 2, None, adapter is None, adapter)
    rehearse(disturbed(student).eval(), teacher)


@pytest.mark.slow
def test_an_exported_student_is_read_back(folder, tmp_path):
    """A student of Kolors in another process of stock diffusers, and read back by us."""
    teacher = load(str(folder))
    student = disturbed(schedulers.student(teacher, 2, None, True, Adapter(rank=4))).eval()
    export(student, teacher, tmp_path / "student", {})
    assert load_student(tmp_path / "student")[0].counts == student.counts


def test_the_empty_prompt_is_encoded_as_its_pipeline_encodes_it(folder):
    teacher = load(str(folder))
    text, null, pooled, null_pooled = teacher.codec.pipe.encode_prompt(["a"])
    ours = teacher.codec.condition(["a"])
    torch.testing.assert_close(ours["text"], text)
    torch.testing.assert_close(ours["pooled"], pooled)
    torch.testing.assert_close(teacher.codec.null["text"], null)
    torch.testing.assert_close(teacher.codec.null["pooled"], null_pooled)


def test_what_its_tokenizer_needs_is_named(tmp_path, monkeypatch):
    import diffusers

    from teachers.catalogue import loading

    class Dummy:
        _backends = ("sentencepiece",)

    monkeypatch.setattr(diffusers, "KolorsPipeline", Dummy)
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    with refused("teacher '*'", "KolorsPipeline", "sentencepiece"):
        load(str(tmp_path))
