"""Chunks, reservoirs and processes change no figure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.errors import MetricError
from eval.metrics.fid import FID, Moments
from eval.metrics.mmd import KID
from eval.protocols import measure as protocols
from eval.protocols.collect import Measurement
from eval.protocols.measure import Protocol
from eval.samples import Samples
from eval.stream import LANES, LaneCollectors, MomentSums, Processes, Reservoir

ROOT = Path(__file__).parent.parent.parent


def features(images):
    return images[:, 0].flatten(1).float() / 32


def pictures(n, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 1, 3, 3), generator=rng, dtype=torch.uint8)


def test_moments_in_chunks_are_numpys_however_far_the_mean():
    x = torch.randn(1000, 6, dtype=torch.double) + 1e6
    tally = MomentSums()
    for i, part in enumerate(x.split([1, 7, 500, 492])):
        tally.add(part, i)
    found = Moments.from_sums(tally)
    assert found.n == 1000
    np.testing.assert_allclose(found.mean, x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.cov, np.cov(x.numpy(), rowvar=False), atol=1e-8)


def test_joined_moments_are_those_of_all_samples():
    x = torch.randn(300, 5)
    a, b, empty = MomentSums(), MomentSums(), MomentSums()
    a.add(x[:80], 0)
    b.add(x[80:], 80)
    empty.merge(a)
    empty.merge(b)
    found, whole = Moments.from_sums(empty), Moments.from_features(x)
    torch.testing.assert_close(found.cov, whole.cov, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.mean, whole.mean, rtol=1e-12, atol=1e-14)


def test_moments_in_one_go_are_torchs_to_the_bit():
    x = torch.randn(500, 64)
    assert torch.equal(Moments.from_features(x).cov, torch.cov(x.double().T))
    assert torch.equal(Moments.from_features(x).mean, x.double().mean(0))


@pytest.mark.parametrize("cuts", [[1000], [400, 600], [1, 2, 997], [250] * 4])
def test_a_reservoir_keeps_the_same_samples_for_all_chunks(cuts):
    x = torch.arange(1000.0)[:, None]
    found, first = Reservoir(100), 0
    for part in x.split(cuts):
        found.add(part, first)
        first += len(part)
    backwards = Reservoir(100)
    for i in reversed(range(10)):
        backwards.add(x[100 * i : 100 * i + 100], 100 * i)
    assert torch.equal(found.features, backwards.features)
    assert torch.equal(found.features[:, 0].long(), found.numbers)


def test_a_reservoir_chooses_evenly_and_by_its_seed():
    found = torch.zeros(1000)
    for seed in range(200):
        reservoir = Reservoir(100, seed)
        reservoir.add(torch.arange(1000.0)[:, None], 0)
        assert len(reservoir.features.unique()) == 100
        found[reservoir.numbers] += 1
    # counts of each are binomial (200, 0.1): mean 20, variance 18
    assert found.var() == pytest.approx(18, rel=0.2)
    thirds = found[:999].view(3, 333).sum(1)
    assert (thirds - 6660).abs().max() < 300


def test_a_reservoir_that_is_not_full_is_all_samples_in_order():
    x = torch.randn(50, 3)
    found = Reservoir(100)
    found.add(x[20:], 20)
    found.add(x[:20], 0)
    assert torch.equal(found.features, x)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16])
def test_lanes_put_together_are_the_same_bits_for_any_number_of_processes(count):
    """Without processes: each one's lanes are made here, and merged as `merged` does."""
    x = torch.randn(40 * 10, 6)

    def joined(count):
        whole = MomentSums()
        lanes = [LaneCollectors(MomentSums) for _ in range(count)]
        for rank, mine in enumerate(lanes):
            for chunk in range(40):
                if Processes(rank, count).owns(chunk):
                    mine.collector(chunk).add(x[10 * chunk : 10 * chunk + 10], 10 * chunk)
        for lane in range(LANES):
            whole.merge(lanes[lane % count].lanes[lane])
        return whole

    one, some = joined(1), joined(count)
    assert some.n == 400
    assert torch.equal(one.mean, some.mean) and torch.equal(one.squares, some.squares)


def test_every_chunk_is_one_processs_and_too_many_processes_are_refused():
    for count in (1, 3, 16):
        owners = [sum(Processes(r, count).owns(c) for r in range(count)) for c in range(50)]
        assert owners == [1] * 50
    with pytest.raises(MetricError, match="17 processes; start at most 16"):
        Processes(0, 17).owns(0)


def protocol(chunk):
    reference = pictures(400, seed=99)
    metrics = (
        FID(features, reference),
        KID(features, reference, subsets=4, subset_size=100),
        lambda s: {"bright": s.images.double().mean().item()},
    )
    return Protocol("toy", [str(i % 7) for i in range(600)], metrics, chunk)


def draw(prompts, seed):
    return Samples(pictures(len(prompts), seed), prompts, 0.5, {"evaluations": seed % 3 + 0.5})


def measure(metrics, chunks):
    found = Measurement(metrics)
    for chunk in chunks:
        found.add(*chunk)
    return found.figures()


def cut_at(wanted, drawn):
    """Draws what `draw` does, noting the seeds, and is stopped before the chunk of that seed."""

    def cut(prompts, seed):
        if seed == wanted:
            raise KeyboardInterrupt
        drawn.append(seed)
        return draw(prompts, seed)

    return cut


def test_a_seed_that_was_cut_off_goes_on_at_its_next_chunk_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "SAVE_EVERY", -1.0)
    drawn, told, keep = [], [], tmp_path / "kept"
    whole = protocol(40).measure_seed(draw, 1)
    with pytest.raises(KeyboardInterrupt):
        protocol(40).measure_seed(cut_at(20, drawn), 1, state=keep)
    again = protocol(40).measure_seed(cut_at(None, drawn), 1, state=keep, progress=told.append)
    assert again == whole
    assert whole["evaluations"] == pytest.approx(1.5)
    assert drawn == list(range(15, 30))
    assert told == [200 + 40 * i for i in range(11)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoil", ["other", "damaged", "cut"])
def test_what_was_collected_of_something_else_counts_for_nothing(tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(protocols, "SAVE_EVERY", -1.0)
    drawn, keep = [], tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        protocol(100).measure_seed(cut_at(3, drawn), 0, state=keep, identity={"steps": 1})
    (file,) = tmp_path.iterdir()
    if spoil == "damaged":
        file.write_bytes(b"x" * 100)
    if spoil == "cut":
        file.write_bytes(file.read_bytes()[:-200])
    about = {"steps": 2 if spoil == "other" else 1}
    found = protocol(100).measure_seed(cut_at(None, drawn), 0, state=keep, identity=about)
    assert drawn == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert found == protocol(100).measure_seed(draw, 0)


def test_figures_in_chunks_are_those_of_all_samples_at_once():
    parts = [draw(["x"] * 200, seed)._replace(costs={}) for seed in range(3)]
    whole = Samples(torch.cat([p.images for p in parts]), ["x"] * 600, 1.5)
    metrics = protocol(None).metrics
    at_once = measure(metrics, [(0, 0, whole)])
    in_parts = measure(metrics, [(i, 200 * i, p) for i, p in enumerate(parts)])
    assert in_parts == pytest.approx(at_once, rel=1e-9)
    assert at_once == {k: v for m in metrics for k, v in m(whole).items()}
    assert "evaluations" not in at_once


def test_averages_over_chunks_are_by_their_sizes():
    levels = {100: 30, 300: 90, 50: 255}
    chunks, first = [], 0
    for i, (n, level) in enumerate(levels.items()):
        images = torch.full((n, 1, 3, 3), level, dtype=torch.uint8)
        chunks.append((i, first, Samples(images, ["x"] * n, 0.0, {"cost": float(level)})))
        first += n
    found = measure(protocol(None).metrics, chunks)
    mean = sum(n * level for n, level in levels.items()) / 450
    assert found["bright"] == pytest.approx(mean) and found["cost"] == pytest.approx(mean)


def test_chunks_of_a_protocol_never_share_a_seed():
    seen = []

    def spy(prompts, seed):
        seen.append(seed)
        return draw(prompts, seed)

    found = protocol(100)(spy, seeds=3)
    assert seen == list(range(18))
    assert found["images_per_s"] == pytest.approx(200)
    assert found["n"] == 600 and found["spread"]["fd"] > 0


def test_features_are_read_once_for_metrics_that_share_them():
    calls = []

    def counted(images):
        calls.append(len(images))
        return features(images)

    reference = pictures(400, seed=99)
    metrics = (FID(counted, reference), KID(counted, reference, subset_size=100))
    calls.clear()
    measure(metrics, [(0, 0, draw(["x"] * 200, 0)), (1, 200, draw(["x"] * 200, 1))])
    assert calls == [200, 200]


def test_two_metrics_of_one_name_are_refused():
    fid = FID(features, pictures(400, seed=99))
    with pytest.raises(MetricError, match="two of them give 'fd'"):
        measure([fid, fid], [(0, 0, draw(["x"] * 200, 0))])


def test_features_that_are_not_numbers_are_refused():
    def broken(images):
        return features(images).where(torch.arange(9) > 0, torch.nan)

    with pytest.raises(MetricError, match="of 20 of 20 images hold NaN"):
        measure(
            [FID(broken, Moments.from_features(torch.randn(20, 9)))], [(0, 0, draw(["x"] * 20, 0))]
        )


@pytest.mark.slow
def test_three_processes_give_the_bits_of_one(tmp_path):
    """Every figure of three processes is one process's, to the bit."""
    found = []
    for count in (1, 3):
        out = tmp_path / f"{count}.json"
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "3"]
        command = [*(launcher if count > 1 else []), __file__, str(out)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        result = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    count = int(os.environ.get("WORLD_SIZE", 1))
    processes = Processes(int(os.environ.get("RANK", 0)), count)
    if count > 1:
        torch.distributed.init_process_group("gloo")
    figures = protocol(40)(draw, 2, processes)
    if processes.rank == count - 1:
        kept = {k: v for k, v in figures.items() if k != "images_per_s"}
        Path(sys.argv[1]).write_text(json.dumps(kept))
    if count > 1:
        torch.distributed.destroy_process_group()
