"""Plans against what a run on this machine holds, and against arithmetic."""

import json

import pytest
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from torch.profiler import ProfilerActivity, profile

from distill.__main__ import app
from distill.config.recipe import Recipe
from distill.planning import forecast
from distill.planning.plan import GPUS, Plan, advice
from distill.training import build
from teachers import load
from tests.helpers import own
from tests.helpers.engines import stream
from tests.helpers.refusals import refused
from tests.helpers.toys import SMALL, recipe_tree

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")


def saved(path, **config):
    """A consistency pipeline whose U-Net is SMALL but for `config`."""
    torch.manual_seed(0)
    unet = UNet2DModel(**{**SMALL, **config}, num_class_embeds=11)
    ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler()).save_pretrained(path)
    return path


def small(pipelines, part=64, parts=1, **more):
    tree = recipe_tree("sid", pipelines["edm"], batch=part * parts, accumulate=parts)
    return Recipe.check({**tree, **more})


def measured(run):
    """The most bytes that a step holds beyond what it found, as the allocator saw."""
    engine = run.engine
    data = stream(engine)
    engine.advance(data)  # the optimisers' moments are there from now on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        engine.advance(data)
    data.close()
    events = seen.profiler.kineto_results.events()
    held = most = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    ("adapters", "part", "parts"),
    [
        pytest.param(None, 64, 1, id="full-64-1"),
        pytest.param(None, 2, 2, marks=pytest.mark.slow, id="full-2-2"),
        pytest.param({"rank": 4}, 64, 1, marks=pytest.mark.slow, id="lora-64-1"),
        pytest.param({"rank": 4}, 2, 2, id="lora-2-2"),
    ],
)
def test_a_plans_step_is_within_a_tenth_of_the_measured_one(
    pipelines, tmp_path, adapters, part, parts
):
    """Activations and gradients of a step, beside what torch's profiler counts."""
    more = {} if adapters is None else {"adapters": adapters}
    recipe = small(pipelines, part, parts, **more)
    plan = forecast.plan(recipe)
    found = measured(build.build(recipe, tmp_path / "run"))
    assert plan.activations + plan.gradients == pytest.approx(found, rel=0.1)


def test_checkpointing_saves_in_a_plan_what_it_saves_in_a_run(tmp_path):
    deep = saved(tmp_path / "deep", layers_per_block=3)
    tree = recipe_tree("consistency", deep, batch=64, accumulate=1) | {"adapters": {"rank": 4}}
    kept = forecast.plan(Recipe.check(tree))
    tree["train"]["checkpointing"] = True
    recipe = Recipe.check(tree)
    plan, found = forecast.plan(recipe), measured(build.build(recipe, tmp_path / "run"))
    assert plan.activations + plan.gradients == pytest.approx(found, rel=0.1)
    assert plan.activations < kept.activations / 2


@pytest.mark.slow
def test_a_plan_keeps_no_casts_of_weights_as_a_run_keeps_none(tmp_path):
    """Of a wide network in bf16, with checkpointing."""
    wide = saved(tmp_path / "wide", block_out_channels=(64, 128))
    train = {"batch": 4, "accumulate": 2, "checkpointing": True, "precision": "bf16"}
    recipe = Recipe.check(recipe_tree("consistency", wide, **train))
    plan, found = forecast.plan(recipe), measured(build.build(recipe, tmp_path / "run"))
    assert plan.activations + plan.gradients == pytest.approx(found, rel=0.1)


@pytest.mark.slow
def test_an_eager_plan_has_the_float32_norms_of_cudas_autocast(pipelines):
    """Compiled code recomputes them; float32 runs and checkpointed ones have none to keep."""

    def activations(compile, **train):
        tree = recipe_tree("sid", pipelines["edm"], batch=64)
        tree["train"] |= {"compile": compile, **train}
        return forecast.plan(Recipe.check(tree)).parts["activations"]

    half, full = {"precision": "bf16"}, {"precision": "fp32"}
    assert activations("off", **half) > 1.2 * activations("blocks", **half)
    assert activations("off", **full) == activations("blocks", **full)
    assert activations("off", **half) < activations("off", **full)


def test_weights_and_optimiser_are_counted_exactly(pipelines, tmp_path):
    recipe = small(pipelines)
    plan, engine = forecast.plan(recipe), build.build(recipe, tmp_path / "run").engine
    networks = [v for v in vars(engine.objective).values() if isinstance(v, torch.nn.Module)]
    held = {p.data_ptr(): p.nbytes for n in networks for p in n.parameters()}
    learns = sum(p.numel() for q in engine.players.values() for p in q.params)
    assert plan.weights == sum(held.values())
    assert plan.optimizer == 8 * learns
    assert plan.average == sum(m.nbytes for m in engine.ema.mean)


def test_samples_through_each_network_are_those_that_a_run_counts(pipelines, tmp_path):
    recipe = small(pipelines, student={"steps": 1})
    engine = build.build(recipe, tmp_path / "run").engine
    data = stream(engine)
    engine.advance(data)
    data.close()
    assert forecast.plan(recipe).evaluations == engine.evaluations


# Keys by which a first stage has none of the last one's turns or terms, in a training of 8 steps.
STAGED = {
    "sida": {"frozen_steps": 6, "gan_start": 6},
    "ladd": {"frozen_steps": 6},
    "ctm": {"gan_start": 6, "levels": 4, "solver_steps": 2},
    "flash": {"stage_steps": 2, "levels": 8},
    "fd-loss": {"fill": 6},
    "progressive": {"initial_steps": 8, "stage_steps": 2},
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("ctm", "sida") else n for n in STAGED]
)
def test_a_plan_holds_what_the_last_stage_does_and_works_as_all_stages(name, pipelines):
    """Work is the mean over stages, and memory that of the largest."""
    tree = recipe_tree(name, pipelines["edm"], steps=8)
    if name == "ctm":
        tree["critic"] = {}
    recipe = Recipe.check({**tree, "objective": {"name": name, **STAGED[name]}})
    late = recipe.objective.copy()
    late |= {k: 0 for k in ("frozen_steps", "gan_start", "fill") if k in late}
    never = Recipe.check({**recipe.tree(), "train": {**recipe.tree()["train"], "steps": 2}})
    plan, first = forecast.plan(recipe), forecast.plan(never)
    last = forecast.plan(Recipe.check({**recipe.tree(), "objective": late}))
    whole, early, after = (sum(p.evaluations.values()) for p in (plan, first, last))
    if name in ("flash", "progressive"):  # their last stages cannot be had alone
        assert plan.activations >= first.activations > 0
    else:
        # but for what the first turn of all makes once, such as tables of times
        assert plan.activations == pytest.approx(last.activations, rel=0.05)
        assert whole == pytest.approx(0.75 * early + 0.25 * after)
    if name in ("sida", "ladd", "ctm"):
        assert plan.activations > first.activations


def test_a_plan_that_does_not_fit_says_which_keys_to_change(pipelines):
    plan = Plan(int(30e9), 0, 0, 0, int(9e9), 0, 10**9, 64, "fp32")
    lines = " ".join(advice(small(pipelines), plan, GPUS["rtx-4090"]))
    for key in ("adapters", "teacher.precision", "train.precision", "train.checkpointing"):
        assert key in lines
    assert advice(small(pipelines), plan, GPUS["h100"]) == []


def test_a_network_of_ones_own_is_planned_as_a_copy_of_it(tmp_path):
    """Three networks of sid's, two of which learn; under adapters one base with two small ones."""
    file = own.write(tmp_path, own.CONV)
    whole = forecast.plan(Recipe.check(own.recipe_tree(file, "sid", "two", train={"steps": 1})))
    count = sum(p.numel() for p in load(f"{file}:two").denoiser.parameters())
    assert (whole.base, whole.weights, whole.gradients) == (count, 12 * count, 4 * count)
    assert whole.flops > 0 and whole.grids == 0 and whole.beside == 0
    adapters = {"rank": 1, "targets": "middle"}
    less = forecast.plan(Recipe.check(own.recipe_tree(file, "sid", "two", adapters=adapters)))
    assert 4 * count < less.weights < 5 * count


def test_one_whose_code_reads_values_is_refused(tmp_path):
    text = own.FLOW.replace(
        "        return s / total", "        assert x.sum().item() < 1e9\n        return s / total"
    )
    file = own.write(tmp_path, text)
    with refused("teacher '*:teacher'", "reads values"):
        forecast.plan(Recipe.check(own.recipe_tree(file, "sid")))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("digits/scm", []),
        pytest.param("digits/meanflow", [], marks=pytest.mark.slow),
        pytest.param("digits/anyflow", ["student.landing=mixed"], marks=pytest.mark.slow),
    ],
)
def test_students_that_keep_to_slow_sinusoids_are_planned(name, keys):
    """Which weights they hold depends on values, and a plan has none."""
    assert 0 < forecast.plan(Recipe.load(name, keys)).peak < 2


def test_an_unknown_card_is_named(tmp_path):
    with refused("--gpu", "rtx-4090"):
        app(["plan", "digits/sid", "--gpu", "rtx4090"], standalone_mode=False)


@pytest.mark.slow
def test_sdxl_under_adapters_holds_at_most_three_and_a_half_bytes_a_parameter(tmp_path):
    """SDXL's plan: 2.87 bytes a base parameter when last looked at, 12.7 GB with CUDA's own."""
    file = tmp_path / "plan.json"
    app(["plan", "sdxl/dmd2-lora", "--json", str(file)], standalone_mode=False)
    plan = json.loads(file.read_text())
    assert plan["base_params"] == 2_567_463_684
    assert plan["bytes_per_base_param"] <= 3.5
    # its build took 18.4 GB while encoders stood beside the networks
    assert plan["parts_gb"]["weights"] + 3 < plan["build_gb"] < plan["peak_gb"]
    assert plan["fits"]


def test_a_smaller_student_is_shown_beside_its_teacher(tmp_path):
    from students.architecture.score import save

    tree = {**recipe_tree("sid", "digits"), "teacher": {"source": "shapes"}}
    tree["data"] = {"source": "shapes"}
    tree["student"] = {"architecture": {"config": {"mid_block_type": None}}}
    plan = forecast.plan(Recipe.check(tree))
    count, work = plan.smaller
    assert count == 1_216_036 and work == pytest.approx(75.4 / 92.4, abs=0.01)
    save(load("shapes"), tmp_path / "small", {"mid_block_type": None}, [], {})
    started = {**tree, "student": {"init": str(tmp_path / "small")}}
    assert forecast.plan(Recipe.check(started)).smaller == plan.smaller
    assert forecast.plan(Recipe.check({**tree, "student": {}})).smaller is None
    shown = plan.tree("rtx-4090", GPUS["rtx-4090"])
    assert shown["student_params"] == 1_216_036
