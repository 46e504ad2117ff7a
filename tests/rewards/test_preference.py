"""Preference models as rewards: evaluation's values of the same picture, and a gradient."""

from math import floor

import pytest
import torch
from torch.nn.functional import interpolate

from distill.config.recipe import Recipe
from distill.rewards import preference
from distill.rewards.preference import PREFERENCES, cover, of_encoders, of_scorer
from distill.rewards.rewards import called, function_of, reward_of
from distill.sampling.used_networks import used_networks
from eval import fetch, resize
from eval.metrics.clip import ClipScore, PickScore
from eval.metrics.rewards import HPS, ImageReward
from eval.protocols import networks
from eval.samples import Samples
from teachers import load
from tests.helpers import preference as small
from tests.helpers.refusals import refused

PROMPTS = ["a cat", "two dogs", "x"]
# Evaluation rounds the resized picture to bytes, in each direction. Small networks make of it less
# than this share of the deviation of values over the pictures. HPS is evaluated without that
# rounding.
TOLERANCE = {"pick-score": 0.02, "clip-score": 0.02, "image-reward": 0.06, "hps-v2.1": 1e-4}


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """Each reward on a small network, its network, and the figure of evaluation by that network."""
    root = tmp_path_factory.mktemp("preferences")
    clip, hps = small.encoders(root / "clip"), small.hps_folder(root / "hps")
    scorer = small.reward_folder(root / "reward")
    plain = ClipScore(str(root / "clip"), "", prefix="", resolution=28)
    return {
        "pick-score": (of_encoders("pick-score", clip, cover(floor), 0.0), clip, PickScore(clip)),
        "hps-v2.1": (of_encoders("hps-v2.1", hps, resize.fit_then_pad, 100.0), hps, HPS(hps)),
        "image-reward": (of_scorer("image-reward", scorer), scorer, ImageReward(scorer)),
        "clip-score": (of_encoders("clip-score", clip, cover(floor)), clip, plain),
    }


def pictures(n, height, width):
    """Of large patches of colour, with noise over them."""
    rng = torch.Generator().manual_seed(5)
    patches = torch.rand(n, 3, 3, 3, generator=rng) * 200
    noise = torch.rand(n, 3, height, width, generator=rng) * 55
    return (interpolate(patches, (height, width)) + noise).to(torch.uint8)


def each(figure, images, prompt):
    """Evaluation's value of each picture."""
    values = [figure(Samples(images[i : i + 1], [prompt])) for i in range(len(images))]
    return torch.tensor([next(iter(v.values())) for v in values])


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize("sides", [(64, 64), (50, 67), (67, 41), (28, 28), (20, 20)])
def test_a_reward_is_evaluations_value_of_the_same_picture(rewards, name, sides):
    reward, _, figure = rewards[name]
    if name == "clip-score":  # the figure has a resize of its own before the network's
        mean = figure.encoders.mean
        figure = lambda samples: {"": mean(samples)}  # noqa: E731
    images = pictures(6, *sides)
    want = each(figure, images, "a cat")
    found = reward(images.float() / 127.5 - 1, ["a cat"] * 6)
    assert found.shape == (6,)
    assert (found - want).abs().max().item() < TOLERANCE[name] * want.std().item()


@pytest.mark.parametrize("rounding", [floor, round])
@pytest.mark.parametrize("sides", [(64, 64), (51, 67), (67, 41), (28, 28), (20, 20)])
def test_pixels_are_evaluations_but_for_its_rounding(rounding, sides):
    """In levels of 255. Pillow rounds twice, after each direction."""
    images = pictures(4, *sides)
    found = cover(rounding)(preference.pixels(images.float() / 127.5 - 1), 28)
    want = resize.resize_then_centre(images, 28, rounding)
    error = (found - want).abs()
    assert error.max() < (1e-3 if sides == (28, 28) else 2.5) and error.mean() < 0.35


@pytest.mark.parametrize("name", PREFERENCES)
def test_its_gradient_is_that_of_finite_differences(rewards, name):
    """In float64, along a random direction, for pictures of another size than the network's."""
    reward, holder, _ = rewards[name]
    network = holder.model[0].double()
    try:
        rng = torch.Generator().manual_seed(6)
        x = torch.rand(3, 3, 40, 33, generator=rng, dtype=torch.float64) * 1.6 - 0.8
        x.requires_grad_(True)
        (gradient,) = torch.autograd.grad(reward(x, PROMPTS).sum(), x)
        assert gradient.flatten(1).norm(dim=1).min() > 0
        along = torch.randn(x.shape, generator=rng, dtype=torch.float64)
        along /= along.norm()
        with torch.no_grad():
            ends = [reward(x + h * along, PROMPTS).sum() for h in (1e-4, -1e-4)]
        slope = (ends[0] - ends[1]) / 2e-4
        assert slope.item() == pytest.approx((gradient * along).sum().item(), rel=1e-4)
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())
        assert not network.training
    finally:
        network.float()


def test_what_lies_outside_of_the_pictures_range_is_not_rewarded(rewards):
    """A file has no such values, so evaluation does not see them."""
    reward, *_ = rewards["pick-score"]
    x = pictures(3, 28, 28).float() / 127.5 - 1
    beyond = torch.where(x > 0.5, x + 1, x)
    torch.testing.assert_close(reward(beyond, PROMPTS), reward(beyond.clamp(-1, 1), PROMPTS))
    with torch.autocast("cpu", torch.bfloat16):  # as in a run of that precision
        low = reward(x.bfloat16(), PROMPTS)
    torch.testing.assert_close(low.float(), reward(x, PROMPTS), rtol=0.1, atol=0.3)


def test_grey_pictures_are_read_and_others_refused(rewards):
    reward, *_ = rewards["image-reward"]
    grey = torch.rand(3, 1, 30, 30)
    torch.testing.assert_close(reward(grey, PROMPTS), reward(grey.expand(-1, 3, -1, -1), PROMPTS))
    with refused("rewards.taste.function", "(3, 2, 8, 8)"):
        called(reward, "taste", torch.rand(3, 3, 2, 8, 8), PROMPTS)
    with refused("rewards.taste.function", "captions", "7"):
        called(reward, "taste", torch.rand(2, 3, 8, 8), ["a", 7])


def test_a_network_is_loaded_once_and_a_missing_one_is_one_line(tmp_path, monkeypatch):
    loaded, real = [], fetch.pretrained
    small.clip_folder(tmp_path)
    monkeypatch.setattr(preference, "PICK", (str(tmp_path), ""))
    monkeypatch.setattr(preference, "PICK_TOKENIZER", (str(tmp_path), ""))
    monkeypatch.setattr(fetch, "pretrained", lambda *v: loaded.append(v) or real(*v))
    preference.preference.cache_clear()
    try:
        for key in ("a", "b"):
            function_of("pick-score", key)(torch.rand(2, 3, 30, 30), ["a", "b"])
        assert len(loaded) == 1
        preference.preference.cache_clear()
        monkeypatch.setattr(preference, "PICK", (str(tmp_path / "scratch"), ""))
        with refused("rewards.a.function", "pick-score", "download"):
            called(function_of("pick-score", "a"), "a", torch.rand(2, 3, 30, 30), ["a", "b"])
    finally:
        preference.preference.cache_clear()


def test_their_networks_are_recorded_so_that_no_figure_of_them_is_held_out():
    assert PREFERENCES.keys() < networks.OF_REWARDS.keys()
    tree = {"a": {"function": "pick-score"}, "b": {"function": "clip-score", "network": "mine"}}
    assert used_networks({"rewards": tree}) == [
        "openai/clip-vit-large-patch14-336", "yuvalkirstain/PickScore_v1"
    ]  # fmt: skip
    assert used_networks({"rewards": {"a": {"function": "hps-v2.1"}}}) == ["HPS v2.1"]
    used = used_networks({"rewards": {"a": {"function": "image-reward"}}})
    assert used == [networks.OF_KINDS["image_reward"]]
    clip = "clip_score[clip-vit-large-patch14-336, '', 336]"
    used = used_networks({"rewards": tree})
    assert networks.held_out([clip, "fid"], "mjhq-30k", used) == {clip: False, "fid": True}


def test_a_name_that_is_none_of_them_is_answered_with_the_nearest():
    with refused("rewards.taste.function", "'pick_score'", "'pick-score'", "file.py:function"):
        function_of("pick_score", "taste")


def test_a_recipe_names_one_and_latents_receive_its_gradient(rewards, monkeypatch):
    """Without a key `network`, and on data of captions."""
    monkeypatch.setattr(preference, "PREFERENCES", {"pick-score": lambda: rewards["pick-score"][0]})
    preference.preference.cache_clear()
    tree = {
        "teacher": "shapes",
        "objective": {"name": "lcm"},
        "data": {"source": "shapes"},
        "rewards": {"taste": {"function": "pick-score", "weight": 0.1}},
        "train": {"steps": 1},
    }
    teacher = load("shapes")
    prompts = ["a red circle", "a blue square"]
    source = type("S", (), {"prompts": prompts})()
    reward = reward_of(Recipe.check(tree), teacher, source)
    x = torch.randn(2, *teacher.shape, requires_grad=True)
    batch = type("B", (), {"items": torch.tensor([1, 0])})()
    found = reward(x, batch)
    images = teacher.codec.decode(x)
    want = rewards["pick-score"][0](images, prompts[::-1])
    torch.testing.assert_close(found, 0.1 * want)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    preference.preference.cache_clear()
