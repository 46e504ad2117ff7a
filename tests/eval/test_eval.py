import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval import digits
from eval.errors import MetricError
from eval.metrics.fid import FID, Moments, frechet
from eval.metrics.prdc import prdc
from eval.protocols.measure import Protocol, floor, protocol
from eval.protocols.spec import label_accuracy
from eval.samples import Samples, to_uint8


def test_bytes_are_rounded_and_not_truncated():
    levels = torch.arange(256) / 127.5 - 1
    assert torch.equal(to_uint8(levels.view(1, 1, 16, 16)).flatten().long(), torch.arange(256))
    near = levels[1:-1].view(1, 1, 2, 127)
    for part in (-0.4, 0.4):
        found = to_uint8(near + part / 127.5).flatten().long()
        assert torch.equal(found, torch.arange(1, 255))
    assert to_uint8(torch.tensor([[[[-5.0, 5.0]]]])).flatten().tolist() == [0, 255]


def test_means_are_over_seeds_with_the_populations_spread_and_speed_is_the_median():
    runs = [{"fd": v, "images_per_s": s} for v, s in ((1.0, 10.0), (2.0, 20.0), (6.0, 100.0))]
    row = Protocol("toy", ["x"] * 7, ()).average(runs)
    assert row["fd"] == 3 and row["images_per_s"] == 20
    assert row["spread"] == {"fd": pytest.approx((14 / 3) ** 0.5)}
    assert (row["protocol"], row["n"], row["seeds"]) == ("toy", 7, 3)


def test_the_classifier_reads_real_digits_as_their_labels_and_others_not():
    images, labels = digits.data()
    some = to_uint8(images[::5])  # none of which it was trained on
    right = label_accuracy()(Samples(some, [str(v) for v in labels[::5].tolist()]))
    assert right["accuracy"] > 0.96
    wrong = label_accuracy()(Samples(some, [str((v + 1) % 10) for v in labels[::5].tolist()]))
    assert wrong["accuracy"] < 0.02


def test_images_that_are_not_numbers_are_refused():
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 0, 0] = math.nan
    with pytest.raises(MetricError, match="1 of 3 images hold NaN"):
        to_uint8(images)


def test_the_frechet_distance_of_shifted_and_scaled_gaussians():
    eye = torch.eye(4, dtype=torch.double)
    a = Moments(torch.zeros(4, dtype=torch.double), eye, 9)
    b = Moments(torch.full((4,), 0.5, dtype=torch.double), 4 * eye, 9)
    assert frechet(a, b) == pytest.approx(4 * 0.25 + 4 * (1 - 2) ** 2)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_is_clean_fids():
    from cleanfid.fid import frechet_distance

    x, y = torch.randn(500, 16).double(), (torch.randn(400, 16) @ torch.randn(16, 16)).double() + 1
    theirs = frechet_distance(
        x.mean(0).numpy(),
        np.cov(x.numpy(), rowvar=False),
        y.mean(0).numpy(),
        np.cov(y.numpy(), rowvar=False),
    )
    assert frechet(Moments.from_features(x), Moments.from_features(y)) == pytest.approx(
        float(theirs), rel=1e-6
    )


def test_its_finite_sample_bias_is_the_predicted_one():
    n, lam = 2000, torch.tensor([2.0**-k for k in range(16)], dtype=torch.double)
    exact = Moments(torch.zeros(16, dtype=torch.double), torch.diag(lam), n)
    found = [
        frechet(Moments.from_features(torch.randn(n, 16, dtype=torch.double) * lam.sqrt()), exact)
        for _ in range(40)
    ]
    pairs = lam[:, None] * lam * (1 + torch.eye(16)) / (2 * (lam[:, None] + lam))
    predicted = lam.sum() / n + pairs.sum() / (n - 1)
    assert sum(found) / len(found) == pytest.approx(predicted.item(), rel=0.1)


def test_too_few_samples_for_the_features_are_refused():
    with pytest.raises(MetricError, match="10 samples for 64 features"):
        Moments.from_features(torch.randn(10, 64))


def test_identical_laws_have_the_known_coverage_and_density():
    n = 1000
    found = [prdc(torch.randn(n, 16), torch.randn(n, 16)) for _ in range(4)]
    mean = {k: sum(f[k] for f in found) / 4 for k in found[0]}
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(5))
    assert mean["coverage"] == pytest.approx(expected, abs=0.015)
    assert mean["density"] == pytest.approx(1, abs=0.06)


def test_a_dropped_mode_costs_coverage_and_recall_but_not_precision():
    real = torch.cat([torch.randn(500, 4), torch.randn(500, 4) + 20])
    whole, half = torch.cat([torch.randn(500, 4), torch.randn(500, 4) + 20]), torch.randn(1000, 4)
    before, after = prdc(real, whole), prdc(real, half)
    assert after["coverage"] < 0.6 * before["coverage"]
    assert after["recall"] < 0.6 * before["recall"]
    assert after["precision"] > 0.95 * before["precision"]


def test_neighbour_metrics_of_a_case_worked_by_hand():
    real, fake = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [9.0]])
    found = prdc(real, torch.cat([fake, torch.tensor([[9.5]])]), k=1)
    # real balls: 0±1, 1±1, 3±2. 0.5 lies in two, 9 and 9.5 in none
    assert found["precision"] == pytest.approx(1 / 3)
    assert found["density"] == pytest.approx(2 / 3)
    assert found["coverage"] == pytest.approx(2 / 3)
    # fake balls: 0.5±8.5, 9±0.5, 9.5±0.5: the first holds all three reals
    assert found["recall"] == 1


def test_the_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    theirs = load_digits()
    images, labels = digits.data()
    assert torch.equal(((images[:, 0] + 1) * 8).long(), torch.from_numpy(theirs.images).long())
    assert labels.tolist() == theirs.target.tolist()


def test_the_classifier_reads_the_digits_it_never_saw():
    images, labels = digits.data()
    test = digits.held_out(len(images))
    right = (digits.classifier()(images[test]).argmax(1) == labels[test]).double().mean()
    assert right > 0.98


def test_digits_features_take_digits_only():
    with pytest.raises(MetricError, match="takes 1×8×8 digits"):
        digits.features(torch.zeros(100, 3, 32, 32, dtype=torch.uint8))


def test_the_protocol_gives_real_digits_a_distance_of_zero():
    images, labels = digits.data()

    def real(prompts, seed):
        assert prompts == [str(v) for v in labels.tolist()]
        return Samples(to_uint8(images), prompts, 2.0)

    found = protocol("digits")(real, seeds=2)
    assert found["fd"] == pytest.approx(0, abs=1e-6)
    assert found["coverage"] == 1
    assert found["images_per_s"] == pytest.approx(1797 / 2)
    assert (found["n"], found["seeds"], found["protocol"]) == (1797, 2, "digits")
    assert found["spread"]["fd"] == pytest.approx(0, abs=1e-6)


def test_noise_on_real_digits_raises_the_distance_and_lowers_coverage():
    images, _ = digits.data()
    fid = FID(digits.features, to_uint8(images))
    found = [
        fid(Samples(to_uint8(images + s * torch.randn_like(images)), []))["fd"]
        for s in (0.1, 0.2, 0.5)
    ]
    assert found[0] < found[1] < found[2]


def test_the_floor_is_real_against_real():
    found = floor(splits=2)
    assert 0.1 < found["fd"] < 1
    assert found["coverage"] > 0.9


def test_an_unknown_protocol_is_refused():
    with pytest.raises(MetricError, match="'digit' is unknown; did you mean 'digits'"):
        protocol("digit")


def test_a_protocol_wants_a_sample_for_each_prompt():
    with pytest.raises(MetricError, match="3 samples; it takes 1797"):
        protocol("digits")(lambda p, s: Samples(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), p), 1)


def test_samples_are_a_plain_tuple():
    assert SimpleNamespace(**Samples(torch.zeros(0), [])._asdict()).seconds == 0.0
