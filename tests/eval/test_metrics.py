"""Each metric against theory and against the package that its paper's authors or users trust."""

import math

import numpy as np
import pytest
import torch

from eval.errors import MetricError
from eval.metrics.extrapolate import at_infinity, sobol_normal, subset
from eval.metrics.fid import FID, FIDInfinity, Moments, bias, frechet
from eval.metrics.inception_score import InceptionScore, InceptionScoreInfinity, score
from eval.metrics.mmd import CMMD, KID, biased, cubic, gaussian, kid, unbiased
from eval.metrics.prdc import PRDC, prdc
from eval.metrics.vendi import Vendi, vendi
from eval.samples import Samples
from eval.stream import Reservoir


def normal(n, d=8, shift=0.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=rng, dtype=torch.double) + shift


def as_images(features):
    """Features (N, D) of any law as uint8 pictures that `as_features` reads back, in tenths."""
    return (features * 10 + 128).round().clamp(0, 255).to(torch.uint8)[:, :, None, None]


def as_features(images):
    return (images[:, :, 0, 0].float() - 128) / 10


def kept(features):
    reservoir = Reservoir(10**6)
    reservoir.add(features, 0)
    return reservoir


# Fréchet distance


def test_a_shift_adds_its_square_to_the_frechet_distance_and_the_bias_is_predicted():
    fid = FID(as_features, as_images(normal(3000)))
    same = fid(Samples(as_images(normal(3000, seed=1)), []))
    moved = fid(Samples(as_images(normal(3000, shift=0.5, seed=1)), []))
    assert same["fd"] == pytest.approx(same["fd_bias"], rel=0.5)
    assert moved["fd"] - same["fd"] == pytest.approx(8 * 0.25, rel=0.1)


def test_the_predicted_bias_is_that_of_isotropic_gaussians_in_64_dimensions():
    exact = Moments(torch.zeros(64).double(), torch.eye(64).double(), 10**9)
    found = [frechet(Moments.from_features(normal(4000, 64, seed=s)), exact) for s in range(6)]
    expected = bias(torch.ones(64).double(), 4000)
    assert expected == pytest.approx(64 / 4000 + (64 * 65 / 4) / 3999)  # 0.276
    assert sum(found) / 6 == pytest.approx(expected, rel=0.03)


def test_a_direction_without_variance_adds_no_bias():
    whole = torch.tensor([2.0, 1.0]).double()
    padded = torch.tensor([2.0, 1.0, 0.0, -1e-17]).double()
    assert bias(padded, 100) == bias(whole, 100)


def test_a_dropped_mode_moves_every_reference_metric():
    two = torch.cat([normal(1500), normal(1500, shift=3.0, seed=1)])
    reference, whole = as_images(two), torch.cat([normal(1500, seed=2), normal(1500, 8, 3.0, 3)])
    one = normal(3000, seed=4)
    for metric, name in (
        (FID(as_features, reference), "fd"),
        (KID(as_features, reference, subsets=5, subset_size=500), "kid"),
    ):
        before, after = (metric(Samples(as_images(v), []))[name] for v in (whole, one))
        assert after > 20 * abs(before)
    found = PRDC(as_features, reference, keep=1000)(Samples(as_images(one), []))
    assert found["coverage"] < 0.6 and found["recall"] < 0.6 and found["precision"] > 0.9


def test_the_frechet_distance_is_torch_fidelitys():
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = normal(400, 16), normal(500, 16, 0.3, 1) * 1.5
    stats = [{"mu": v.mean(0).numpy(), "sigma": np.cov(v.numpy(), rowvar=False)} for v in (x, y)]
    theirs = fidelity.fid_statistics_to_metric(*stats, verbose=False)
    theirs = theirs["frechet_inception_distance"]
    assert frechet(Moments.from_features(x), Moments.from_features(y)) == pytest.approx(
        theirs, rel=1e-4
    )


# extrapolation


def test_a_line_in_one_over_n_is_extrapolated_exactly():
    counts = [100, 200, 500, 1000]
    assert at_infinity(counts, [3 + 70 / n for n in counts]) == pytest.approx(3, abs=1e-12)


def test_the_extrapolated_frechet_distance_takes_the_samples_bias_away():
    reference = Moments(torch.zeros(16).double(), torch.eye(16).double(), 10**9)
    plain, infinite = FID(as_features, reference), FIDInfinity(as_features, reference, start=300)
    found = kept(normal(3000, 16, 0.25))
    end = infinite.measure(found)["fd_infinity"]
    assert end == pytest.approx(1.0, abs=0.06)
    low = Samples(as_images(normal(300, 16, 0.25)), [])
    assert plain(low)["fd"] == pytest.approx(1.0 + plain(low)["fd_bias"], rel=0.15)
    assert plain(low)["fd"] > 1.15


def test_too_few_samples_to_extrapolate_are_refused():
    metric = InceptionScoreInfinity(as_features, start=50)
    with pytest.raises(MetricError, match="give more than 50"):
        metric.measure(kept(normal(50)))


def test_sobol_latents_are_standard_normal_and_more_even_than_independent_ones():
    z = sobol_normal(1024, (2, 4), seed=3)
    assert z.shape == (1024, 2, 4)
    flat = z.flatten(1)
    assert flat.mean(0).abs().max() < 0.01  # of independent ones about 0.06
    assert (flat.std(0) - 1).abs().max() < 0.02
    assert torch.equal(z, sobol_normal(1024, (2, 4), seed=3))
    assert not torch.equal(z, sobol_normal(1024, (2, 4), seed=4))


def test_latents_beyond_the_sobol_sequence_are_refused():
    with pytest.raises(MetricError, match="use independent latents"):
        sobol_normal(2, (16, 64, 64), seed=0)


# KID and CMMD


def test_the_kernel_distance_of_a_shifted_gaussian_is_its_closed_form():
    mu = 0.5
    x, y = normal(3000, 1), normal(3000, 1, mu, 1)
    expected = 3 * mu**2 + 3 * mu**4 + (mu**3 + 3 * mu) ** 2  # 3.578
    assert unbiased(cubic, x, y) == pytest.approx(expected, rel=0.1)


def test_the_unbiased_distance_of_one_law_to_itself_is_zero_on_average():
    found = [kid(normal(300, seed=s), normal(300, seed=s + 50), 1, 300)[0] for s in range(30)]
    error = np.std(found) / math.sqrt(30)
    assert abs(np.mean(found)) < 3 * error
    assert min(found) < 0 < max(found)


def test_the_biased_distance_is_too_large_by_what_the_diagonals_add():
    n, d, sigma = 200, 4, 10.0
    x, y = normal(n, d), normal(n, d, seed=1)
    mean_kernel = (sigma**2 / (sigma**2 + 2)) ** (d / 2)  # E k of two standard normal points
    gap = biased(gaussian, x, y) - unbiased(gaussian, x, y)
    assert gap == pytest.approx(2 * (1 - mean_kernel) / n, rel=0.1)
    assert biased(gaussian, x, x) == pytest.approx(0, abs=1e-14)


def test_the_gaussian_distance_of_shifted_gaussians_is_its_closed_form():
    d, sigma, delta = 2, 10.0, 8.0
    x, y = normal(2000, d), normal(2000, d, delta / math.sqrt(d), 1)
    within = (sigma**2 / (sigma**2 + 2)) ** (d / 2)
    across = within * math.exp(-(delta**2) / (2 * (sigma**2 + 2)))
    assert unbiased(gaussian, x, y) == pytest.approx(2 * within - 2 * across, rel=0.03)


def test_kernel_distances_are_torch_fidelitys():
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = normal(300, 16), normal(300, 16, 0.2, 1)
    for estimate, ours in (("unbiased", unbiased), ("biased", biased)):
        tables = [cubic(a, b).numpy() for a, b in ((x, x), (x, y), (y, y))]
        theirs = fidelity.mmd2(*tables, mmd_est=estimate)
        assert ours(cubic, x, y) == pytest.approx(float(theirs), rel=1e-4)


def test_kid_is_clean_fids_where_the_one_subset_is_all_there_is():
    from cleanfid.fid import kernel_distance

    x, y = normal(400, 16), normal(400, 16, 0.3, 1)
    theirs = kernel_distance(x.numpy(), y.numpy(), num_subsets=1, max_subset_size=400)
    assert kid(x, y, 1, 400)[0] == pytest.approx(theirs, rel=1e-4)


def test_cmmd_takes_embeddings_at_length_one_and_sums_in_blocks():
    x, y = normal(2100, 4), normal(2050, 4, 0.5, 1)  # both beyond a block
    found = CMMD(as_features, x).measure(kept(7 * y))
    u, v = (t / t.norm(dim=1, keepdim=True) for t in (x, (7 * y).float().double()))
    dist = [torch.cdist(a, b).square().div(-200).exp() for a, b in ((u, u), (v, v), (u, v))]
    expected = 1000 * (dist[0].mean() + dist[1].mean() - 2 * dist[2].mean())
    assert found["cmmd"] == pytest.approx(expected.item(), rel=1e-6)
    assert found["cmmd_unbiased"] < found["cmmd"]


def test_subsets_of_kid_are_seeded_and_too_few_samples_refused():
    x, y = normal(600), normal(600, seed=1)
    assert kid(x, y, 3, 200) == kid(x, y, 3, 200) != kid(x, y, 3, 200, seed=1)
    with pytest.raises(MetricError, match="600 samples for subsets of 1000"):
        kid(x, y)


def test_the_spread_of_kid_is_the_populations_over_its_subsets():
    x, y = normal(300), normal(300, seed=1)
    rng, found = torch.Generator().manual_seed(0), []
    for _ in range(3):
        a, b = (v[torch.randperm(300, generator=rng)[:50]] for v in (x, y))
        found.append(unbiased(cubic, a, b))
    assert kid(x, y, 3, 50) == (pytest.approx(np.mean(found)), pytest.approx(np.std(found)))


@pytest.mark.parametrize(("subsets", "size"), [(0, 100), (3, 1), (3, 0), (-1, 100)])
def test_a_kernel_distance_over_no_subsets_or_no_pairs_is_refused(subsets, size):
    x = normal(200)
    with pytest.raises(MetricError, match=f"kid: {subsets} subsets of {size}; take one"):
        kid(x, x, subsets, size)
    with pytest.raises(MetricError, match=f"mine: {subsets} subsets of {size}; take one"):
        KID(as_features, x, subsets=subsets, subset_size=size, name="mine")


# Inception score


def test_sure_and_even_predictions_score_the_number_of_classes_and_unsure_ones_score_one():
    assert score(torch.eye(10).repeat(30, 1) * 100) == pytest.approx(10)
    assert score(torch.zeros(300, 10)) == pytest.approx(1)
    assert score(torch.tensor([[1e3, 0.0]] * 20)) == 1  # the second class's p is 0
    assert score(torch.eye(2).repeat(10, 1) * 1e30) == pytest.approx(2)


def test_few_samples_lower_the_inception_score_as_predicted_and_extrapolation_mends_it():
    classes = torch.randint(20, (4000,), generator=torch.Generator().manual_seed(0))
    logits = torch.nn.functional.one_hot(classes, 20).double() * 100
    found = InceptionScore(as_features, splits=40).measure(kept(logits))["inception_score"]
    assert found == pytest.approx(20 * math.exp(-19 / 200), rel=0.01)
    mended = InceptionScoreInfinity(as_features, start=200).measure(kept(logits))
    assert mended["inception_score_infinity"] == pytest.approx(20, rel=0.01)


def test_splits_are_of_shuffled_samples_and_their_spread_is_the_populations():
    """Drawn class by class, as protocols draw, unshuffled splits would each be of one class."""
    logits = torch.eye(10).repeat_interleave(100, 0) * 100
    found = InceptionScore(as_features, splits=10).measure(kept(logits))
    assert found["inception_score"] > 9
    whole = InceptionScore(as_features, splits=1).measure(kept(logits))
    assert whole == {"inception_score": pytest.approx(10), "inception_score_std": 0}
    some = normal(15, 3) * 3
    a, b = (score(part) for part in subset(kept(some).features, 15, 0).tensor_split(2))
    two = InceptionScore(as_features, splits=2).measure(kept(some))
    assert two["inception_score_std"] == pytest.approx(abs(a - b) / 2) and a != b


def test_the_inception_score_is_torch_fidelitys():
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    logits = normal(500, 30) * 2
    theirs = fidelity.isc_features_to_metric(logits, splits=1, shuffle=False)
    assert score(logits) == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


# neighbours


def test_neighbour_metrics_are_the_prdc_packages():
    package = pytest.importorskip("prdc")
    real, fake = normal(500, 8).float(), (normal(400, 8, 0.4, 1) * 0.8).float()
    theirs = package.compute_prdc(real.double().numpy(), fake.double().numpy(), 5)
    assert prdc(real, fake) == pytest.approx(theirs, abs=1e-4)


def test_blocks_change_no_neighbour_metric(monkeypatch):
    real, fake = normal(700), normal(650, shift=0.2, seed=1)
    whole = prdc(real, fake)
    monkeypatch.setattr("eval.metrics.prdc.ROWS", 64)
    assert prdc(real, fake) == whole


def test_a_point_lies_in_no_ball_of_its_own_copies():
    real = normal(200, 16).float()
    copies = real[:10].repeat(20, 1)  # each has its five nearest at no distance
    assert prdc(real, copies)["recall"] == 0
    near = torch.tensor([np.linalg.norm(real - v, axis=1) for v in real.double().numpy()])
    ball = near.sort(1).values[:, 5]
    held = (near[:, :10] < ball[:, None]).sum().item() * 20
    assert prdc(real, copies)["density"] == pytest.approx(held / 200 / 5, abs=1e-12)


def test_an_offset_common_to_all_changes_no_neighbour_metric():
    real, fake = normal(200, 16), normal(200, 16, 0.3, 1)
    assert prdc(real + 2**23, fake + 2**23) == prdc(real, fake)


def test_coverage_of_identical_laws_with_three_neighbours_is_seven_eighths():
    found = [prdc(normal(800, 8, seed=s), normal(800, 8, seed=s + 9), 3) for s in range(3)]
    assert sum(f["coverage"] for f in found) / 3 == pytest.approx(0.875, abs=0.02)


# Vendi


def test_the_vendi_score_counts_different_samples():
    assert vendi(torch.ones(50, 6)) == pytest.approx(1)
    assert vendi(torch.eye(6)) == pytest.approx(6)
    assert vendi(torch.eye(6) * 1e-20) == pytest.approx(6)
    assert vendi(torch.eye(6).repeat(10, 1)) == pytest.approx(6)
    assert Vendi(as_features)(Samples(as_images(10 * torch.eye(4).repeat(3, 1)), []))[
        "vendi"
    ] == pytest.approx(4)


def test_the_vendi_score_is_its_authors():
    package = pytest.importorskip("vendi_score.vendi")
    few, many = normal(20, 50), normal(200, 50, 0.3)
    assert vendi(few) == pytest.approx(package.score_dual(few.numpy()), rel=1e-4)
    assert vendi(many) == pytest.approx(package.score_dual(many.numpy()), rel=1e-4)
