"""HPS v2.1 and ImageReward: what their authors' files compute, in stock networks."""

import os

import pytest
import torch

from eval import resize
from eval.errors import MetricError
from eval.metrics.converted import HPS_FILE, IMAGE_REWARD_FILE
from eval.metrics.features import CLIP, normalised
from eval.metrics.rewards import HPS, ImageReward
from eval.samples import Samples
from tests.helpers import preference

PROMPTS = ["a cat", "two dogs", "x"]


def pictures(n=3, height=50, width=67):
    rng = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=rng)


def test_hps_computes_what_open_clip_computes_of_its_file(tmp_path):
    encoders, images = preference.hps_folder(tmp_path), pictures()
    network, tokenizer = encoders.model
    ids = tokenizer(PROMPTS, padding="max_length", max_length=40, return_tensors="pt")["input_ids"]
    ends = (ids == tokenizer.eos_token_id).int().argmax(1)
    state = torch.load(tmp_path / HPS_FILE, weights_only=True)["state_dict"]
    pixels = normalised(resize.fit_then_pad(images, 28), CLIP)
    want = preference.open_clip_cosines(state, pixels, ids, ends)
    assert want.std() > 0.01
    torch.testing.assert_close(encoders.cosines(images, PROMPTS), want.double())
    assert HPS(encoders)(Samples(images, PROMPTS)) == {
        "hps_v2.1": pytest.approx(100 * want.mean().item(), rel=1e-4)
    }
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_image_reward_computes_what_its_authors_formulas_do(tmp_path):
    scorer, images = preference.reward_folder(tmp_path), pictures()
    network, tokenizer = scorer.model
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    state = torch.load(tmp_path / IMAGE_REWARD_FILE, weights_only=True)
    pixels = normalised(resize.resize_then_centre(images, 28, round), CLIP)
    want = preference.reward_values(state, pixels, tokens["input_ids"], tokens["attention_mask"])
    assert want.std() > 0.01
    torch.testing.assert_close(scorer.values(images, PROMPTS), want.double(), rtol=1e-4, atol=1e-5)
    figure = ImageReward(scorer)(Samples(images, PROMPTS))["image_reward"]
    assert figure == pytest.approx(want.mean().item(), rel=1e-3)
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_the_longer_side_fits_and_the_rest_is_black():
    images = pictures(1, 56, 28)
    found = resize.fit_then_pad(images, 28)
    assert not found[..., :7].any() and not found[..., 21:].any()
    torch.testing.assert_close(found[..., 7:21], resize.bicubic(images.float(), (28, 14)))
    square = pictures(1, 28, 28)
    assert torch.equal(resize.fit_then_pad(square, 28), square.float())
    assert resize.fit_then_pad(pictures(1, 28, 20), 28).shape == (1, 3, 28, 28)


class Evil:
    def __reduce__(self):
        return os.system, ("false",)


@pytest.mark.parametrize("kind", ["hps", "reward"])
def test_files_that_lack_weights_or_hold_code_are_refused(tmp_path, kind):
    def fresh():
        made = preference.hps_folder if kind == "hps" else preference.reward_folder
        return made(tmp_path)

    fresh()
    file = tmp_path / (HPS_FILE if kind == "hps" else IMAGE_REWARD_FILE)
    tree = torch.load(file, weights_only=True)
    state = tree.get("state_dict", tree)
    name = "visual.proj" if kind == "hps" else "blip.visual_encoder.norm.weight"
    value = state.pop(name)
    for change, says in (({}, "lacks 1 of its weights"), ({name: value[:-1]}, "not those of")):
        scorer = fresh()
        torch.save({**state, **change}, file)
        with pytest.raises(MetricError, match=says) as caught:
            _ = scorer.model
        assert "\n" not in str(caught.value)
    for content in (Evil(), None):
        scorer = fresh()
        torch.save(content, file) if content else file.write_bytes(b"nothing")
        with pytest.raises(MetricError, match="cannot be read"):
            _ = scorer.model
