"""Guidance scales drawn for each sample of a batch."""

import torch

from distill.data.stream import Scaled, Source
from teachers.conditions import GUIDANCE_SCALE


def sources():
    plain = Source((2,), torch.randn(40, 2), {"label": torch.arange(40)}, seed=3, size=40)
    return plain, Scaled(plain, 2.0, 8.0)


def test_each_sample_has_its_own_scale_and_nothing_else_changes():
    plain, source = sources()
    a, b = plain.batch(1, 0, 2, 8), source.batch(1, 0, 2, 8)
    assert torch.equal(a.x, b.x) and torch.equal(a.noise, b.noise)
    assert torch.equal(a.cond["label"], b.cond["label"])
    assert b.cond[GUIDANCE_SCALE].shape == (8,)
    assert len(b.cond[GUIDANCE_SCALE].unique()) == 8


def test_scales_are_even_in_their_range_and_of_the_batch_and_shard_alone():
    _, source = sources()
    draw = lambda d, k: source.batch(d, k, 2, 8).cond[GUIDANCE_SCALE]  # noqa: E731
    scales = torch.cat([draw(d, k) for d in range(200) for k in (0, 1)])
    assert scales.min() >= 2 and scales.max() <= 8
    assert abs(scales.mean() - 5) < 0.1 and abs(scales.std() - 6 / 12**0.5) < 0.05
    assert torch.equal(draw(5, 1), draw(5, 1)) and not torch.equal(draw(5, 1), draw(5, 0))
