"""Averages after training: power functions in closed form, post-hoc EMA, search, command."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.averaging import average, student
from distill.averaging.average import by_length, by_search, combined, recorded, searched
from distill.averaging.posthoc import averaged, coefficients, error_of, inner, snapshots
from distill.averaging.search import Candidate, averages, evolve
from distill.config.recipe import Recipe
from distill.data.fingerprint import of_tensors
from distill.evaluation.finish import export_student
from distill.training import build, checkpoint
from distill.training.ema import PowerEMA, exponent
from eval.metrics.fid import FID
from eval.protocols.measure import protocol
from tests.helpers.command_line import called
from tests.helpers.exports import in_this_process
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree

D = torch.float64


# ---- power functions


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.15, 3.56)])
def test_exponents_are_the_published_ones(length, gamma):
    assert exponent(length) == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.12, 0.25])
def test_an_exponents_profile_has_that_standard_deviation(length):
    gamma = exponent(length)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(length)


def weight(value=0.0):
    return torch.nn.Parameter(torch.tensor([value], dtype=torch.float32))


def test_the_average_begins_at_the_weights_and_follows_its_recurrence():
    p = weight(5.0)
    power, expected = PowerEMA([p], [0.1]), 0.0
    for n in range(1, 30):
        with torch.no_grad():
            p.fill_(math.sin(n))
        power.update()
        kept = (1 - 1 / n) ** (exponent(0.1) + 1)
        expected = kept * expected + (1 - kept) * math.sin(n)
        if n == 1:
            assert power.means[0][0].item() == p.item()
    assert power.means[0][0].item() == pytest.approx(expected, rel=1e-5)


def test_of_weights_that_grow_evenly_the_average_is_that_of_the_profile():
    """∫ τ p(τ) dτ = (γ + 1)/(γ + 2) t."""
    p = weight()
    power = PowerEMA([p], [0.05, 0.1])
    for n in range(1, 3001):
        with torch.no_grad():
            p.fill_(float(n))
        power.update()
    for (mean,), gamma in zip(power.means, power.exponents, strict=True):
        assert mean.item() == pytest.approx((gamma + 1) / (gamma + 2) * 3000, rel=1e-3)


# ---- post-hoc EMA


def profile(tau, t, gamma):
    return (gamma + 1) * tau**gamma / t ** (gamma + 1) * (tau <= t)


def test_inner_products_are_the_integrals_of_profiles():
    tau = (torch.arange(200_000, dtype=D) + 0.5) / 200_000 * 10
    for a, b in [((10.0, 3.0), (10.0, 7.0)), ((4.0, 7.0), (9.0, 2.0)), ((9.0, 2.0), (4.0, 7.0))]:
        expected = (profile(tau, *a) * profile(tau, *b)).mean() * 10
        found = inner(*(torch.tensor(v).double() for v in (*a, *b)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_coefficients_sum_to_one_and_find_a_snapshot_again():
    t = torch.arange(1, 9).repeat_interleave(2) * 512
    gammas = torch.tensor([exponent(0.05), exponent(0.1)]).repeat(8)
    for length in (0.06, 0.08, 0.12, 0.2):
        c = coefficients(t, gammas, 8 * 512, exponent(length))
        assert c.dtype == D and c.sum().item() == pytest.approx(1, abs=1e-12)
    c = coefficients(t, gammas, 8 * 512, exponent(0.1))
    torch.testing.assert_close(c, torch.eye(16, dtype=D)[15], atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [0.07, 0.12, 0.18])
def test_a_reconstructed_average_is_the_one_that_training_would_have_kept(length, tmp_path):
    p = weight()
    kept, direct = PowerEMA([p], [0.05, 0.1]), PowerEMA([p], [length])
    rng, value = torch.Generator().manual_seed(0), 0.0
    for n in range(1, 2049):
        value += 0.1 * (3 * math.tanh(n / 500) - value) + 0.2 * torch.randn(1, generator=rng).item()
        with torch.no_grad():
            p.fill_(value)
        kept.update(), direct.update()
        if n % 128 == 0:
            kept.save(tmp_path / "averages", n)
    entries = snapshots(tmp_path)
    assert len(entries) == 32
    c, (mean,) = averaged(entries, length, 1)
    assert c.sum().item() == pytest.approx(1, abs=1e-12)
    assert mean.dtype == D
    assert mean.item() == pytest.approx(direct.means[0][0].item(), abs=4e-3)
    assert abs(mean.item() - value) > 0.05  # the last weights are elsewhere


@pytest.mark.parametrize(
    ("updates", "lengths", "wanted", "error"),
    [
        ([1000], [0.05], 0.05, 0.0),
        ([1000], [0.05], 0.2, 1.84),
        ([500, 1000], [0.05, 0.1], 0.25, 0.73),
        ([*range(125, 1001, 125)], [0.05, 0.1], 0.07, 0.0135),
    ],
)
def test_how_far_snapshots_are_from_a_length_is_the_integral_of_their_profiles(
    updates, lengths, wanted, error
):
    places = [(t, exponent(v)) for t in updates for v in lengths]
    t, g = (torch.tensor(v, dtype=torch.float64) for v in zip(*places, strict=True))
    found = error_of(t, g, 1000, exponent(wanted))
    assert found == pytest.approx(error, rel=0.02, abs=1e-6)
    tau = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100  # by the midpoint rule

    def profile(at, gamma):
        inside = (gamma + 1) * tau**gamma / at ** (gamma + 1)
        return torch.where(tau <= at, inside, torch.zeros_like(tau))

    c = coefficients(t, g, 1000, exponent(wanted)).tolist()
    mixed = sum(w * profile(at, gamma) for w, (at, gamma) in zip(c, places, strict=True))
    target = profile(1000, exponent(wanted))
    assert found == pytest.approx(((mixed - target).norm() / target.norm()).item(), abs=2e-3)


def test_snapshots_of_an_earlier_stage_have_no_part(tmp_path):
    p = weight(1.0)
    power = PowerEMA([p], [0.05, 0.1])
    power.update()
    power.save(tmp_path / "averages", 1)
    power.restart()
    with torch.no_grad():
        p.fill_(7.0)
    power.update()
    power.save(tmp_path / "averages", 2)
    entries = snapshots(tmp_path)
    assert {e.updates for e in entries} == {1} and len(entries) == 2
    assert next(averaged(entries, 0.1, 1)[1]).item() == pytest.approx(7)


# ---- the search


def test_founders_are_averages_from_the_last_weights_to_the_even_mean():
    found = averages(4)
    assert found[0] == (0, 0, 0, 1) and found[-1] == pytest.approx([0.25] * 4)
    assert all(sum(c) == pytest.approx(1) and list(c) == sorted(c) for c in found)


def test_the_search_finds_a_combination_that_no_average_is_and_repeats_itself():
    optimum = torch.tensor([0.6, -0.9, 0.1, 1.2], dtype=D)

    def fitness(c):
        assert sum(c) == pytest.approx(1)
        return (torch.tensor(c, dtype=D) - optimum).norm().item()

    judged = list(evolve(fitness, averages(4), 600, seed=1))
    start = min(fitness(c) for c in averages(4))
    assert start > 1
    assert min(judged).fitness < 0.25 * start
    assert min(min(judged).coefficients) < 0
    assert judged == list(evolve(fitness, averages(4), 600, seed=1))
    assert judged[50:] != list(evolve(fitness, averages(4), 600, seed=2))[50:]


def test_combined_weights_are_the_linear_combination():
    weights = [[torch.full((2,), float(k)), torch.full((1, 3), 2.0 * k)] for k in (1, 2, 4)]
    first, second = combined(weights, (0.5, -1.0, 1.5))
    assert first.tolist() == [4.5, 4.5] and second.tolist() == [[9.0] * 3]
    assert first.dtype == D


def test_a_stopped_search_goes_on_to_the_same_candidates(tmp_path):
    calls = []

    def fitness(c):
        calls.append(c)
        if len(calls) == 21:
            raise KeyboardInterrupt
        return sum(v * v for v in c)

    record, about = tmp_path / "record.json", {"seed": 3}
    with pytest.raises(KeyboardInterrupt):
        searched(fitness, averages(3), 40, 3, record, about)
    assert len(recorded(record, about)) == 20
    assert recorded(record, {"seed": 4}) == []
    judged = searched(fitness, averages(3), 40, 3, record, about)
    assert len(calls) == 21 + 20
    assert judged == searched(
        lambda c: sum(v * v for v in c), averages(3), 40, 3, tmp_path / "r", {}
    )


# ---- runs


@pytest.fixture(scope="module")
def run(pipelines, tmp_path_factory):
    """A run of six steps with all checkpoints and two averages, interrupted and resumed."""
    out = tmp_path_factory.mktemp("run") / "run"
    keys = {"steps": 6, "save_every": 2, "keep": 9, "ema_lengths": [0.05, 0.1]}
    tree = recipe_tree("ect", pipelines["edm"], **keys)
    tree["eval"] = {"protocol": "digits", "teacher_seeds": 0, "seeds": 1}
    first = build.build(Recipe.check(tree), out)
    evaluated, first.engine.cfg = first.engine.cfg, first.engine.cfg.model_copy(update={"steps": 4})
    first.engine.train()
    first.engine.cfg = evaluated
    resumed = build.build(Recipe.check(tree), out, resume=True)
    assert resumed.engine.power.updates == 4
    resumed.engine.train()
    with resumed.engine.ema.swapped(), in_this_process():
        export_student(resumed)
    return resumed


def test_a_run_keeps_power_averages_over_a_resume(run, pipelines, tmp_path):
    tree = {**run.recipe.tree()}
    alone = build.build(Recipe.check(tree), tmp_path / "alone")
    alone.engine.train()
    for a, b in zip(alone.engine.power.means, run.engine.power.means, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    names = [f"step-{k:06d}.safetensors" for k in (2, 4, 6)]
    for out in (alone.out, run.out):
        assert sorted(p.name for p in (out / "averages").iterdir()) == names
    one, other = (load_file(o / "averages" / names[-1]) for o in (alone.out, run.out))
    assert all(torch.equal(one[k], other[k]) for k in one)


def weights_of(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_command_exports_the_average_of_a_length_with_a_card(
    run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(average, "export", lambda *a, export=average.export: export(*a[:3], 0))
    out = tmp_path / "averaged"
    with in_this_process():
        code, text, err = called(capsys, "average", run.out, "--ema-length", 0.1, "--out", out)
    assert code == 0, err
    assert f"student in {out}" in text.replace("\n", "")
    exported, (name, p) = (
        weights_of(out),
        next(iter(run.student.denoiser.backbone.named_parameters())),
    )
    place = [q is p for q in run.engine.power.params].index(True)
    torch.testing.assert_close(
        exported[name], run.engine.power.means[1][place], rtol=1e-4, atol=1e-6
    )
    assert not torch.equal(exported[name], weights_of(run.out / "student")[name])
    assert (
        "**Weights**: the post-hoc EMA of length 0.1 over 6 updates"
        in (out / "README.md").read_text()
    )
    assert sum(
        json.loads((out / "average.json").read_text())["coefficients"].values()
    ) == pytest.approx(1)
    with refused("--out*", "exists"):
        by_length(run.out, 0.1, out)


def test_a_search_exports_the_best_of_what_it_judged(run, tmp_path, monkeypatch):
    whole = protocol("digits")
    fid = tuple(m for m in whole.metrics if isinstance(m, FID))
    few = replace(whole, prompts=whole.prompts[:200], metrics=fid)
    monkeypatch.setattr(student, "protocol", lambda name: few)
    out, known = tmp_path / "searched", []
    kept = average.searched
    monkeypatch.setattr(average, "searched", lambda *a: known.append(a[-1]) or kept(*a))
    with in_this_process():
        rows = by_search(run.out, out, 10, seed=0, window=2, steps=None)
    about = json.loads((out / "average.json").read_text())
    # a record of other weights under the same names is not gone on with
    weights = average.saved(checkpoint.steps(run.out / "checkpoints")[-2:])
    values = [p for v in weights.values() for p in v]
    assert known[0]["contents"] == of_tensors(values)
    assert known[0]["contents"] != of_tensors([values[0] + 1e-6, *values[1:]])
    assert about["weights"] == ["ema", "step-000004", "step-000006"]
    assert sum(about["coefficients"].values()) == pytest.approx(1)
    assert about["fitness"]["best"] <= about["fitness"]["first"]  # the first is the run's average
    assert about["network_evaluations"] == 10 * 200
    assert rows["1"]["fd"] > 0 and about["metrics"] == json.loads(json.dumps(rows))
    assert "**Weights**: a linear combination of 3 saved weights" in (out / "README.md").read_text()
    assert not list(tmp_path.glob(".searched*"))


def test_what_cannot_be_averaged_is_refused(run, tmp_path, capsys):
    with refused("RUN*", "train.ema_lengths"):
        snapshots(tmp_path)
    with refused("RUN*", "recipe.yaml"):
        by_search(tmp_path, tmp_path / "out", 10, 0, None, None)
    (tmp_path / "recipe.yaml").write_text("teacher: digits")
    with refused("RUN*", "train.keep"):
        by_search(tmp_path, tmp_path / "out", 10, 0, None, None)
    with refused("--steps", "3", "1"):
        by_search(run.out, tmp_path / "out", 10, 0, None, 3)
    for words in (("--ema-length", 0.5), (), ("--search", "--ema-length", 0.1)):
        code, _, err = called(capsys, "average", run.out, "--out", tmp_path / "out", *words)
        assert code == 2 and "--ema-length" in err and err.count("\n") == 1
    for option in ("--window", "--steps", "--seed", "--evaluations"):
        words = ("--ema-length", 0.1, option, 12)
        code, _, err = called(capsys, "average", run.out, "--out", tmp_path / "out", *words)
        assert code == 2 and err.startswith(f"distill: {option}: only --search")
    for length in (0.0, 1e-300, "nan"):
        words = ("--ema-length", length, "--out", tmp_path / "out")
        code, _, err = called(capsys, "average", run.out, *words)
        assert code == 2 and "0.0001 to 0.28" in err
    (tmp_path / "file").touch()
    with refused("--out*", "file"):
        by_length(run.out, 0.1, tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()
    assert min(Candidate(2.0, (1.0,)), Candidate(1.0, (0.0,))).fitness == 1.0


@pytest.mark.parametrize("about", [None, {"updates": "many", "stage": "0"}, {"updates": "3"}])
def test_a_file_that_is_no_snapshot_is_named(about, tmp_path):
    (tmp_path / "averages").mkdir()
    file = tmp_path / "averages" / "step-000002.safetensors"
    save_file({"0.1/0": torch.zeros(1)}, file, about)
    with refused("RUN*", file, "delete"):
        snapshots(tmp_path)


def test_a_snapshot_without_a_parameter_is_named(tmp_path):
    (tmp_path / "averages").mkdir()
    file = tmp_path / "averages" / "step-000002.safetensors"
    save_file({"0.1/0": torch.zeros(1)}, file, {"updates": "3", "stage": "0"})
    with refused("RUN*", file):
        list(averaged(snapshots(tmp_path), 0.1, 2)[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_snapshot_of_weights_that_are_not_finite_is_named(value, tmp_path):
    (tmp_path / "averages").mkdir()
    saved = {"0.1/0": torch.tensor([1.0, value])}
    about = {"updates": "10", "stage": "0"}
    save_file(saved, tmp_path / "averages/step-10.safetensors", metadata=about)
    with refused("RUN", "step-10.safetensors", "not finite"):
        list(averaged(snapshots(tmp_path), 0.1, 1)[1])


def test_a_search_ranks_what_cannot_be_judged_last(tmp_path):
    found = searched(
        lambda c: float("nan") if c[0] > 0 else 2.0, averages(2), 8, 0, tmp_path / "r", {}
    )
    assert min(found).fitness == 2.0
    assert max(found).fitness == float("inf") and len(found) == 8
