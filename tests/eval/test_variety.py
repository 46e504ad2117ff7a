"""Variety within a prompt: closed forms, collapse, and the embedded data themselves."""

import pytest
import torch

from eval import digits, shapes
from eval.errors import MetricError
from eval.metrics.perceptual import Variety, spread
from eval.protocols.measure import protocol
from eval.samples import Samples, to_uint8

D = torch.float64


def test_the_spread_is_the_mean_square_distance_of_pairs_by_prompt():
    torch.manual_seed(0)
    features = torch.randn(7, 3, dtype=D)
    prompts = ["a", "b", "a", "b", "a", "b", "c"]  # c has one sample, and no pair
    pairs = {p: [] for p in "ab"}
    for i in range(7):
        for j in range(i):
            if prompts[i] == prompts[j]:
                pairs[prompts[i]].append((features[i] - features[j]).square().sum())
    expected = sum(torch.stack(v).mean() for v in pairs.values()) / 2
    assert spread(features, prompts) == pytest.approx(expected.item())


def test_gaussians_of_half_the_width_have_a_quarter_of_the_variety():
    """Whatever the prompts' means are: they have no part."""
    torch.manual_seed(0)
    means = 5 * torch.randn(4, 1, 2, 1, 1)
    noise = torch.randn(4, 5000, 2, 1, 1)
    prompts = [p for p in "abcd" for _ in range(5000)]

    def made(width):
        return Samples((means + width * noise).flatten(0, 1), prompts)

    metric = Variety(lambda v: v.flatten(1), made(1.0))
    for width in (0.0, 0.5, 2.0):
        assert metric(made(width))["variety"] == pytest.approx(width**2, abs=1e-6)


def test_without_a_pair_there_is_no_variety():
    with pytest.raises(MetricError, match="two or more"):
        spread(torch.randn(2, 3), ["a", "b"])


def test_real_digits_and_drawings_have_a_variety_of_one_and_collapse_has_none():
    images, labels = digits.data()
    names = [str(v) for v in labels.tolist()]
    first = torch.stack([images[labels == k][0] for k in range(10)])
    whole, one = (to_uint8(v) for v in (images, first[labels]))
    captions = protocol("shapes").prompts
    cases = (
        ("digits", Samples(whole, names), 1.0),
        ("digits", Samples(one, names), 0.0),
        ("shapes", Samples(shapes.draw(captions, seed=3), captions), 1.0),
    )
    for name, samples, expected in cases:
        (metric,) = (m for m in protocol(name).metrics if isinstance(m, Variety))
        assert metric(samples)["variety"] == pytest.approx(expected, abs=0.05)
