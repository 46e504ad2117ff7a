"""`distill auto` chooses by memory, hours and evidence: planted limits, and what is chosen."""

import dataclasses
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from distill.auto import evidence as evidence_of
from distill.auto.budget import FEWEST, budget_of, spent
from distill.auto.choose import choose
from distill.auto.evidence import Evidence, best, of_model, rows
from distill.auto.ladder import ladder_of
from distill.auto.machine import Machine
from distill.auto.start import start_of
from distill.auto.subject import Subject
from distill.auto.text import expected, recipe_text
from distill.config.recipe import Recipe, read_yaml
from distill.planning.plan import GB, RESERVE, Plan
from teachers.process import Karras, Linear
from tests.helpers.refusals import refused

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import evidence as benchmark  # noqa: E402  # pyright: ignore

TEACHER: Any = None  # no choice of these subjects reads it


def subject(source, family, kind, parameters, **more):
    return Subject(source, TEACHER, False, family, kind, int(parameters), **more)


SUBJECTS = {
    "sdxl": subject("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", "text", 2.57e9),
    "flux": subject("black-forest-labs/FLUX.1-dev", "flux", "text", 11.9e9),
    "sd15": subject("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd15", "text", 0.86e9),
    "edm": subject("edm-imagenet-64x64-cond-adm.pkl", "edm", "labels", 0.3e9),
    "digits": subject("digits", "edm", "labels", 0.65e6),
    "shapes": subject("shapes", "sd15", "text", 1.78e6),
}
IMAGES = {"source": "photos"}


def planned(recipe: Recipe) -> Plan:
    """A plan by a rough formula of the recipe's keys, in place of a simulated step."""
    size = next(s.parameters for s in SUBJECTS.values() if s.source == recipe.teacher.source)
    frozen = {"nf4": 0.53, "bf16": 2.0}.get(recipe.teacher.precision or "", 4.0)
    adapters, train = recipe.adapters, recipe.train
    trained = 2 * size if adapters is None else 2 * size * adapters.rank / 4000
    offloaded = {p.optimizer for p in recipe.players.values()} == {"adamw-offloaded"}
    one = size * (0.3 if train.checkpointing else 3.0)
    return Plan(
        weights=int(size * frozen + 4 * trained),
        gradients=int(4 * trained),
        optimizer=0 if offloaded else int(8 * trained),
        average=int(2 * trained),
        activations=int(one * train.batch / train.accumulate),
        beside=0,
        base=size,
        batch=train.batch,
        precision=train.precision,
        flops=600.0 * size * train.batch * (4 / 3 if train.checkpointing else 1),
        family="sdxl",
    )


def chosen(name, memory=24.0, hours=8.0, steps=None, data=None, gpu="rtx-4090", **more):
    data = IMAGES if name == "edm" and data is None else data or {}
    machine = Machine(gpu, memory, 0.45)
    return choose(dataclasses.replace(SUBJECTS[name], **more), machine, hours, steps, data, planned)


# ---- memory


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd15", "edm"])
def test_less_memory_never_chooses_a_larger_form(name):
    start = start_of(SUBJECTS[name], None, IMAGES if name == "edm" else {})
    ladder = ladder_of(start.tree, SUBJECTS[name], True, planned)
    places = []
    for memory in (320, 200, 141, 80, 48, 32, 24, 16, 12, 10, 8):
        try:
            fit = ladder.fitting(Machine("rtx-4090", memory))
        except Exception:
            places.append(len(ladder.forms))
            continue
        assert fit.need <= memory
        assert fit.need == planned(Recipe.check(fit.form.tree)).most + RESERVE
        places.append(ladder.forms.index(fit.form))
    assert places == sorted(places)
    assert len(set(places)) >= 3


def test_forms_go_from_all_weights_to_adapters_on_four_bits():
    names = [
        form.name
        for form in ladder_of(start_of(SUBJECTS["sd15"], None, {}).tree, SUBJECTS["sd15"], True,
                              planned).forms
    ]  # fmt: skip
    assert names == [
        "all weights, moments on the host, 8 samples at a time",
        "all weights, moments on the host, activations recomputed, 8 samples at a time",
        "all weights, moments on the host, activations recomputed, 1 sample at a time",
        "LoRA of rank 64 on bf16 weights, activations recomputed, 1 sample at a time",
        "LoRA of rank 64 on nf4 weights, activations recomputed, 1 sample at a time",
        "LoRA of rank 16 on nf4 weights, activations recomputed, 1 sample at a time",
    ]


def test_flux_has_four_bits_on_a_small_card_and_bf16_on_a_large_one():
    small, large = chosen("flux", 24), chosen("flux", 141, gpu="h200")
    assert small.tree["teacher"]["precision"] == "nf4"
    assert large.tree["teacher"]["precision"] == "bf16"
    why = next(r.why for r in small.reasons if r.what == "form")
    assert "LoRA of rank 64 on bf16 weights" in why
    assert "23.8 GB" in why  # two bytes of each of 11.9 billion weights


def test_too_little_memory_names_the_smallest_form_and_what_it_needs():
    need = 11.9 * (0.53 + 2 * 16 / 4000 * 18 + 0.3) + RESERVE
    with refused("--gpu", "LoRA of rank 16 on nf4 weights", f"{need:.1f} GB"):
        chosen("flux", 10)


def test_learning_rates_are_those_of_adapters_where_all_weights_do_not_fit():
    form = chosen("sd15", 10).tree
    assert form["adapters"] == {"rank": 64}
    rates = {k: v["lr"] for k, v in form["players"].items()}
    scale = math.sqrt(form["train"]["batch"] / 2048)
    assert rates["student"] == pytest.approx(5e-5 * scale, rel=1e-2)
    assert rates["fake"] == pytest.approx(1e-4 * scale, rel=1e-2)


# ---- hours


@pytest.mark.parametrize(
    "name", ["sdxl", "shapes", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sd15", "edm"))]
)
def test_more_hours_never_train_for_fewer_steps_or_on_smaller_batches(name):
    """From half an hour to five thousand."""
    found = []
    for hours in (0.5, 1, 2, 4, 8, 16, 30, 60, 200, 1000, 5000):
        try:
            train = chosen(name, 48, hours).tree["train"]
        except Exception:
            continue
        assert train["batch"] % train["accumulate"] == 0
        assert train["hours"] == pytest.approx(0.9 * hours)
        found.append((train["steps"], train["batch"]))
    assert len(found) > 5
    for (steps, batch), (more_steps, larger) in zip(found, found[1:], strict=False):
        assert more_steps >= steps
        assert larger >= batch


def test_steps_come_before_samples():
    train = {"steps": 1000, "batch": 256, "accumulate": 4}
    assert budget_of(train, 6400, 1.0, False).steps == 100  # of the smallest batch, 64
    half = budget_of(train, 64_000, 1.0, False)
    assert (half.steps, half.batch, half.accumulate) == (1000, 64, 1)
    assert half.rate == 0.5
    more = budget_of(train, 200_000, 1.0, False)
    assert (more.steps, more.batch, more.accumulate) == (1000, 128, 2)
    all_of_it = budget_of(train, 1e9, 1.0, False)
    assert (all_of_it.steps, all_of_it.batch, all_of_it.accumulate) == (1000, 256, 4)
    assert (all_of_it.share, all_of_it.rate) == (1, 1)


def test_a_batch_grows_beyond_the_recipes_only_where_the_recipe_was_never_run():
    train = {"steps": 1000, "batch": 8, "accumulate": 2}
    assert budget_of(train, 1e9, 1.0, False).batch == 8
    grown = budget_of(train, 1e9, 1.0, True)
    assert (grown.batch, grown.accumulate, grown.rate) == (128, 32, 1)
    assert budget_of(train, 40_000, 1.0, True).batch == 32


def test_a_second_is_no_limit_of_0_hours():
    fast = Machine("this", 24.0, rate=1e18)
    choice = choose(SUBJECTS["digits"], fast, 1 / 3600, None, {}, planned)
    assert choice.tree["train"]["hours"] == pytest.approx(0.9 / 3600, rel=1e-3)
    assert Recipe.check(choice.tree).train.hours


def test_hours_that_buy_no_run_are_refused_with_how_many_do():
    with refused("--hours", "3 training steps of 64 samples", "1.5 hours"):
        budget_of({"steps": 1000}, 64 * 3.0, 1.0, False)
    assert pytest.approx(1.48, abs=0.01) == 64 * FEWEST / 3600 / 0.6


def test_what_is_counted_in_steps_shrinks_with_the_steps():
    tree = {
        "objective": {"name": "consistency", "stage_steps": 88},
        "players": {"student": {"lr": 1e-3, "warmup": 20}},
        "train": {"steps": 703, "batch": 64},
    }
    half = spent(tree, budget_of(tree["train"], 64 * 351.5, 1.0, False))
    assert half["objective"]["stage_steps"] == 44
    assert half["players"]["student"] == {"lr": 1e-3, "warmup": 10}
    assert half["train"] == {"steps": 351, "batch": 64, "accumulate": 1}
    assert tree["objective"]["stage_steps"] == 88


# ---- evidence


def row(name, steps, fd, spread=0.01, evaluations=100):
    return Evidence(
        "digits", name, None, {}, name, steps, 100, evaluations, 10, 3,
        {"fd": (fd, spread)}, "docs", "fd",
    )  # fmt: skip


def test_the_best_row_has_the_fewest_steps_of_those_within_the_spread():
    four, two, one = row("a", 4, 0.20), row("b", 2, 0.205), row("c", 1, 0.23)
    assert [r.name for r in best([one, four, two])] == ["b", "a"]
    noisy, wide = row("c", 1, 0.23, 0.04), row("a", 4, 0.20, 0.04)
    assert [r.name for r in best([noisy, four, two])] == ["b", "a"]  # its own spread is no merit
    assert [r.name for r in best([noisy, wide, two])] == ["c", "b", "a"]
    assert [r.name for r in best([row("d", 4, 0.2, evaluations=50), four])] == ["d", "a"]
    assert best([]) == []


def test_the_packages_evidence_is_that_of_the_results():
    assert evidence_of.FILE.read_text(encoding="utf-8") == benchmark.evidence()
    assert {r.model for r in rows()} == {"digits", "shapes", "analytic:gaussian"}
    dmd2 = next(r for r in rows() if r.name == "digits/dmd2")
    assert dmd2.text() == "FD 0.176 ± 0.013"
    assert dmd2.trained == 1400


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_every_row_of_evidence_is_a_recipe(name):
    from distill.auto.start import tree_of

    for found in of_model(name):
        recipe = Recipe.check(tree_of(found))
        assert recipe.objective["name"] == found.objective
        assert recipe.train.steps == found.trained


# ---- starts


def test_digits_get_the_recipe_of_the_best_figure_as_it_is():
    choice = chosen("digits")
    own = Recipe.check(read_yaml(ROOT / "recipes/digits/dmd2.yaml")).tree()
    tree = choice.recipe.tree()
    assert tree["eval"].pop("stop_when_flat") == {"window": 3, "tolerance": 0.02}
    assert tree["eval"].pop("every") == 116
    assert (tree["train"].pop("hours"), tree["train"].pop("compile")) == (7.2, "off")
    for section in (own["eval"], own["train"]):
        for key in ("stop_when_flat", "every", "hours", "compile"):
            section.pop(key, None)
    assert tree == own
    assert choice.figure == "FD 0.176 ± 0.013"
    why = next(r.why for r in choice.reasons if r.what == "objective")
    assert "kd: FD 0.169 ± 0.01 in 2 steps" in why


STARTS = {
    ("digits", 4): ("digits/reflow", "reflow"),
    ("digits", 2): ("digits/kd", "kd"),
    ("shapes", None): ("shapes/consistency-lora", "consistency"),
    ("shapes", 1): ("shapes/sid-lora", "sid"),
    ("sdxl", None): ("sdxl/dmd2-lora", "dmd2"),
    ("sd15", None): ("sd15/dmd2", "dmd2"),
    ("edm", None): ("edm/dmd2", "dmd2"),
}


@pytest.mark.parametrize(("name", "steps"), STARTS)
def test_starts(name, steps):
    start = start_of(SUBJECTS[name], steps, IMAGES if name == "edm" else {})
    recipe, objective = STARTS[name, steps]
    assert (start.name, start.tree["objective"]["name"]) == (recipe, objective)
    if steps is not None:
        assert start.tree["student"]["steps"] == steps


def test_without_data_an_objective_that_needs_none_is_taken():
    start = start_of(SUBJECTS["edm"], None, {})
    assert start.name == "edm/sid"


def test_a_family_without_a_recipe_starts_from_the_nearest_and_says_so():
    flow: Any = SimpleNamespace(denoiser=SimpleNamespace(process=Linear()))
    mine = Subject("me/mine", flow, True, "lumina2", "text", 2_600_000_000)
    start = start_of(mine, None, {"prompts": "mine.txt"})
    assert (start.name, start.relation) == ("sd3/dmd2-lora", "like")
    assert start.tree["teacher"] == {"guidance": 4.5, "precision": "bf16", "source": "me/mine"}
    assert start.tree["data"] == {"prompts": "mine.txt"}
    small = dataclasses.replace(mine, parameters=1_000_000)
    for data in ({}, {"captions": "mine"}, {"source": "photos"}):
        tree = start_of(small, None, data).tree
        assert tree["data"] == (data or {"prompts": "pack:starter"})
        assert "eval" not in tree
        assert Recipe.check(tree).needs_data <= ("source" in data)


@pytest.mark.parametrize(("process", "student"), [
    (Karras(), {"steps": 1, "start": 2.5}), (Linear(), {"steps": 1}),
])  # fmt: skip
def test_a_small_model_of_labels_starts_from_digits_at_a_level_that_it_can_have(process, student):
    teacher: Any = SimpleNamespace(denoiser=SimpleNamespace(process=process))
    mine = Subject("mine", teacher, True, "edm", "labels", 600_000)
    start = start_of(mine, 1, {})
    assert (start.name, start.relation) == ("digits/diff-instruct", "like")  # the best without data
    assert start.tree["student"] == student
    assert start.tree["teacher"] == {"guidance": 1, "source": "mine"}
    assert start_of(mine, 1, IMAGES).name == "digits/dmd2"


def test_a_lora_makes_the_student_an_adapter():
    file = {"file": "style.safetensors", "strength": 0.8}
    tree = chosen("sd15", 48, data={"captions": "mine"}, adapters=(file,)).tree
    assert tree["teacher"]["adapters"] == [file]
    assert tree["adapters"]["rank"] == 64
    assert tree["data"] == {"captions": "mine"}
    unknown = chosen("sdxl", 24, adapters=(file,)).unknown
    assert any("words of your LoRA" in line for line in unknown)


# ---- what is written


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_written_recipe_is_the_chosen_one_and_has_every_reason(name, tmp_path):
    choice = chosen(name, 48, 100)
    text = recipe_text(choice, "distill auto", Machine("rtx-4090", 48.0))
    (tmp_path / "recipe.yaml").write_text(text)
    assert Recipe.load(tmp_path / "recipe.yaml").tree() == choice.recipe.tree()
    comments = " ".join(v.lstrip("# ") for v in text.splitlines() if v.startswith("#"))
    for reason in choice.reasons:
        assert f"{reason.what} {reason.value}: {reason.why}" in comments
    for line in choice.unknown:
        assert line in comments
    assert max(len(v) for v in text.splitlines() if v.startswith("#")) <= 100
    assert yaml.safe_load(text)


def test_what_is_not_known_is_said():
    lines = " ".join(chosen("sdxl", hours=1).unknown)
    for part in ("No bench measured this model", "was never run at full scale",
                 "the doctor checked nothing", "No training was measured on rtx-4090",
                 "of the recipe's training", "cannot end early", "pack:starter"):  # fmt: skip
        assert part in lines
    assert chosen("digits").unknown == [
        "The weights are not here: the doctor checked nothing.",
        "No training was measured on rtx-4090: its speed is assumed.",
        "Starting kernels takes longer than so small a network computes.",
    ]


def test_expected_cost_is_that_of_the_plan():
    choice = chosen("sdxl", hours=8)
    tree = choice.tree["train"]
    flops = 600 * 2.57e9 * tree["batch"] * 4 / 3 * tree["steps"]
    hours = flops / (165e12 * 0.4) / 3600 / 0.9
    assert choice.hours == pytest.approx(hours)
    assert choice.hours <= 8
    assert choice.dollars == pytest.approx(0.45 * hours)
    assert f"${choice.dollars:.2f}" in expected(choice, Machine("rtx-4090", 24.0))
    assert choice.gb == pytest.approx(planned(choice.recipe).peak + RESERVE, abs=1 / GB * 1e9)


def test_a_timed_machine_takes_its_own_rate():
    machine = Machine("this machine's CPU, 1 thread", 16.0, rate=1e12, gpu=False)
    plan = planned(Recipe.check(start_of(SUBJECTS["digits"], None, {}).tree))
    assert machine.seconds(plan) == pytest.approx(1.2 * plan.flops / 1e12)
    assert "compile" not in choose(SUBJECTS["digits"], machine, 8, None, {}, planned).tree["train"]
