"""What a codec declares of itself, and what is known of one whose class is a user's own."""

import pytest
import torch
from torch import nn

from distill.data.fingerprint import fingerprint, networks
from teachers import Teacher, load
from teachers.analytic import Gaussian
from teachers.edm.latents import Latents
from teachers.teacher import Pixels, is_tokenizer, parts_of
from tests.helpers import families

DENOISER = Gaussian(torch.zeros(2), torch.ones(2))


class Mine:
    """The members that a codec must have, in a class that derives from nothing."""

    def __init__(self):
        torch.manual_seed(0)
        self.vae, self.encoders = nn.Linear(2, 2), {"text": nn.Linear(3, 3)}
        self.gain, self.words, self._used = 0.5, ["a", "b"], 3

    @property
    def null(self):
        raise AssertionError("encoded before it is needed")

    def condition(self, prompts):
        return None

    def encode(self, images):
        return images

    def decode(self, latents):
        return latents


def same(a, b):
    """Whether two parts are one network or tokenizer, or equal values."""
    if isinstance(a, nn.Module) or is_tokenizer(a):
        return a is b
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_codec_of_ones_own_class_gets_the_fields_that_it_lacks_and_keeps_those_it_has():
    mine = Mine()
    codec = Teacher(DENOISER, mine, (2,)).codec
    assert codec is mine
    assert (codec.classes, codec.null_label, codec.pipe, codec.folder) == (0, None, None, None)
    assert isinstance(codec.vae, nn.Linear)


def test_its_parts_are_found_by_its_attributes_and_its_fingerprint_follows_them():
    mine = Mine()
    teacher = Teacher(DENOISER, mine, (2,))
    parts = dict(parts_of(mine))
    assert sorted(parts) == ["encoders.text", "gain", "vae", "words.0", "words.1"]
    assert {id(m) for m in networks(teacher)} == {id(mine.vae), id(mine.encoders["text"])}
    before = fingerprint(teacher)
    mine._used += 1
    assert fingerprint(teacher) == before
    for change in ({"gain": 0.6}, {"gain": 0.5, "words": ["a", "c"]}):
        vars(mine).update(change)
        assert fingerprint(teacher) != before
    mine.words = ["a", "b"]
    assert fingerprint(teacher) == before
    with torch.no_grad():
        mine.vae.bias.add_(1)
    assert fingerprint(teacher) != before


def test_the_denoisers_network_is_no_part_of_a_codec_that_holds_it():
    mine = Mine()
    mine.network = nn.Linear(2, 2)
    denoiser = Gaussian(torch.zeros(2), torch.ones(2))
    denoiser.layer = mine.network
    assert mine.network not in networks(Teacher(denoiser, mine, (2,)))


@pytest.mark.parametrize("name", ["digits", "shapes", "dit", "sdxl", "flux-dev", "qwen", "wan"])
def test_the_parts_that_a_codec_names_are_all_that_a_look_at_its_attributes_finds(folders, name):
    embedded = name in ("digits", "shapes")
    options = {} if embedded else families.OPTIONS.get(name, {})
    teacher = load(name if embedded else folders(name), **options)
    network = {id(m) for m in teacher.denoiser.modules()}
    found = {k: v for k, v in parts_of(teacher.codec) if id(v) not in network}
    named = teacher.codec.parts()
    # fields of default value are looked over where nothing names them
    found |= {k: v for k, v in named.items() if k in ("classes", "null_label") and k not in found}
    assert sorted(named) == sorted(found)
    assert all(same(named[k], found[k]) for k in named)


@pytest.mark.parametrize("null", [None, 10])
def test_so_are_those_of_latents(null):
    codec = Latents(10, null, (1.0, 2.0), (0.0, 1.0), nn.Linear(2, 2))
    assert set(dict(parts_of(codec))) <= set(codec.parts())
    assert list(codec.parts())[-3:] == ["scale", "bias", "vae"]
    assert ("null.class_labels" in codec.parts()) is (null is not None)


def test_pixels_without_labels_have_no_vae_no_pipeline_and_no_classes():
    codec = Pixels()
    assert (codec.classes, codec.null, codec.vae, codec.pipe) == (0, None, None, None)
    assert load("shapes").codec.vae is not None
