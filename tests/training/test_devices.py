"""Training, sampling and export where the device is not the host: on a fake GPU, or a real one.

Under `make test` the device is the fake one of helpers/fake_gpu.py; under `make test-gpu` it is the
GPU. Inside `hot()` either also refuses what makes the host wait.
"""

from functools import partial

import pytest
import torch

from distill.config.recipe import Recipe
from distill.data.from_recipe import examples
from distill.data.stream import Stream
from distill.evaluation import subject
from distill.objectives.trajectory.progressive import Progressive
from distill.planning.doctor import diagnose
from distill.sampling import teacher_sampler
from distill.sampling.guided_teacher import guided, load_teacher
from distill.sampling.timesteps import gits
from distill.training import build
from students import schedulers
from students.export import formats, lora_files
from students.export.folder import export, pictures, rehearse, request
from students.lora import Adapter, unwrap
from teachers import load
from teachers.solver import SOLVERS, solve
from tests.helpers import families
from tests.helpers.disturbed import disturbed
from tests.helpers.fake_gpu import hot
from tests.helpers.toys import FIVE, recipe_tree

pytestmark = [pytest.mark.device, pytest.mark.usefixtures("gpu")]
WAYS = {"all weights": None, "adapters": {"rank": 2}}


def made(tree, out, resume=False):
    return build.build(Recipe.check(tree), out, resume).engine


def stream(engine):
    per = engine.shards
    device, size = engine.accelerator.device, engine.cfg.batch // per
    return Stream(engine.source, device, engine.draws, range(per), per, size)


def play(engine, steps=2):
    """The first steps move tables and null conditions to the device; the others may not wait."""
    data = stream(engine)
    for _ in range(2):
        engine.advance(data)
    with hot():
        logs = [engine.advance(data) for _ in range(steps)]
    data.close()
    return logs


def where(modules):
    return {p.device.type for m in modules for p in (*m.parameters(), *m.buffers())}


# Each in one way in every run, and in the other in the slow one: test_fake_gpu.py plays them all.
ADAPTED = ("dmd2", "consistency", "ect")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (n, w)
        if (n in ADAPTED) == (w == "adapters")
        else pytest.param(n, w, marks=pytest.mark.slow)
        for n in (*FIVE, "ect")
        for w in WAYS
    ],
)
def test_every_objective_trains_samples_and_resumes(name, way, pipelines, tmp_path, gpu):
    """On the device, without a wait for the host in the hot loop; saved, and taken up again."""
    tree = recipe_tree(name, pipelines["edm"], steps=6, save_every=1)
    if name == "progressive":
        tree["objective"] |= {"initial_steps": 2, "stage_steps": 1}  # a new stage makes a network
    if WAYS[way]:
        tree["adapters"] = WAYS[way]
    engine = made(tree, tmp_path / "run")
    networks = [v for v in vars(engine.objective).values() if isinstance(v, torch.nn.Module)]
    assert where(networks) == {gpu.type}
    logs = play(engine)
    assert {v.device.type for log in logs for v in log.values()} == {gpu.type}
    assert all(v.isfinite() for log in logs for v in log.values())
    assert {v.device.type for v in engine.ema.mean} == {gpu.type}
    engine.latest = logs[-1]
    engine.shown = engine.shown[:6]  # two batches
    engine.sample()
    assert list((tmp_path / "run" / "samples").iterdir())
    engine.save()
    again = made(tree, tmp_path / "run", resume=True)
    assert again.step == engine.step
    for player, other in zip(engine.players.values(), again.players.values(), strict=True):
        assert all(map(torch.equal, player.params, other.params))
    again.train()


GUIDANCE = {
    "classifier-free": 2.0,
    "projected": {"scale": 2.0, "kind": "apg", "threshold": 1.0},
    "rescaled": {"scale": 2.0, "rescale": 0.7},
    "skip-layer": {"scale": 2.0, "kind": "skip", "blocks": ["backbone.mid_block.resnets.0"]},
    "auto": {"scale": 2.0, "kind": "auto", "weaker": "digits"},
    "in an interval": {"scale": 2.0, "interval": (0.2, 20.0)},
}


@pytest.mark.parametrize("kind", GUIDANCE)
def test_guidance_follows_the_device_and_does_not_wait(kind, pipelines, gpu):
    source = "digits" if kind == "auto" else str(pipelines["edm"])
    told = {"source": source, "guidance": GUIDANCE[kind], "null_label": 10}
    recipe = Recipe.check({"teacher": told, "objective": {"name": "sid"}, "train": {"steps": 1}})
    teacher = load_teacher(recipe.teacher)
    z, t, cond = (
        torch.randn(3, 1, 8, 8),
        torch.tensor([0.2, 0.5, 0.9]),
        teacher.codec.condition([1, 2, 3]),
    )
    with torch.no_grad():
        here = guided(recipe.teacher, teacher)(z, t, cond)
        teacher.denoiser.to(gpu)
        denoiser = guided(recipe.teacher, teacher)
        inputs = z.to(gpu), t.to(gpu), {k: v.to(gpu) for k, v in cond.items()}
        there = denoiser(*inputs)
        torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=1e-4)
        if kind != "in an interval":  # it says that it waits
            with hot():
                denoiser(*inputs)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_walk_on_the_device(solver, pipelines, gpu):
    teacher = load(str(pipelines["edm"]), null_label=10)
    z, cond = torch.randn(2, 1, 8, 8), teacher.codec.condition([1, 2])
    with torch.no_grad():
        here = solve(teacher.denoiser, z, 3, solver, cond)
        teacher.denoiser.to(gpu)
        there = solve(
            teacher.denoiser, z.to(gpu), 3, solver, {k: v.to(gpu) for k, v in cond.items()}
        )
    assert there.device.type == gpu.type and there.isfinite().all()
    if solver not in ("ancestral", "renoise"):  # whose noise is the device's own
        torch.testing.assert_close(there.cpu(), here, atol=1e-3, rtol=1e-3)


DRAWN = {
    "a solver": {"solver": "heun"},
    "adaptive guidance": {"solver": "ddim", "guidance": 2.0, "adaptive": 0.9},
    "DeepCache": {"solver": "ddim", "cache": 2},
    "GITS": {"solver": "ddim", "schedule": "gits"},
    "a scheduler": {"solver": "EDMDPMSolverMultistepScheduler"},
}


@pytest.mark.parametrize("how", DRAWN)
def test_a_teachers_pictures_are_the_hosts(how, gpu, monkeypatch):
    monkeypatch.setattr(teacher_sampler, "gits", partial(gits, fine_steps=12))
    pairs = []
    for device in (torch.device("cpu"), gpu):
        found = subject.teacher("digits", device, **DRAWN[how])
        pairs.append(found.sampler([3, 7], 3, None)([3, 7], 0).images)
    assert pairs[0].device == pairs[1].device == torch.device("cpu")
    chosen = how in ("adaptive guidance", "GITS")  # by comparisons that rounding may turn
    if not (chosen and gpu.type == "cuda"):
        assert (pairs[0].int() - pairs[1].int()).abs().max() <= 2


@pytest.mark.slow
def test_teachers_are_examined_where_they_are(gpu):
    """The doctor on the digits teacher, on the device."""
    teacher = load("digits")
    teacher.denoiser.to(gpu)
    checks = diagnose(teacher, *examples("digits"))
    assert not [c for c in checks if c.verdict == "broken"]


@pytest.mark.parametrize("name", ["sdxl", "dit", "flux-schnell", "sana", "wan"])
def test_the_stock_pipeline_draws_students_of_two_steps(name, folders, gpu):
    """The noise that its scheduler draws is the student's, whatever the device's own would be."""
    teacher = load(folders(name), **families.OPTIONS.get(name, {}))
    teacher.denoiser.to(gpu)
    rehearse(disturbed(schedulers.student(teacher, 2)).to(gpu), teacher)


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_quantised_weights_are_read_without_waiting(precision, folders, gpu):
    teacher = load(folders("sd"), precision=precision)
    teacher.denoiser.to(gpu)
    x, t = torch.randn(1, *teacher.shape, device=gpu), torch.full((1,), 0.5, device=gpu)
    cond = {k: v.to(gpu) for k, v in teacher.codec.condition(["a cat"]).items()}
    x.requires_grad_()
    for step in range(2):
        with hot() if step else torch.enable_grad():
            teacher.denoiser(x, t, cond).square().mean().backward()
    assert x.grad.isfinite().all()


@pytest.mark.slow
def test_activations_are_recomputed_on_the_device(pipelines, tmp_path):
    """Checkpointing on the device that is not the host."""
    tree = recipe_tree("sid", pipelines["edm"], checkpointing=True)
    play(made({**tree, "adapters": {"rank": 2}}, tmp_path / "run"))


def test_closed_forms_train_on_the_device(tmp_path):
    tree = {"teacher": {"source": "analytic:gaussian"}, "objective": {"name": "dmd2"},
            "train": {"steps": 4, "batch": 8, "sample_every": 0}}  # fmt: skip
    engine = made(tree, tmp_path / "run")
    engine.train()
    assert engine.step == 4


def test_moments_at_rest_visit_the_device(pipelines, tmp_path):
    tree = recipe_tree("consistency", pipelines["edm"])
    tree["players"] = {"student": {"optimizer": "adamw-offloaded"}}
    play(made(tree, tmp_path / "run"))


def test_a_lora_file_is_compared_on_the_host(folders, tmp_path, monkeypatch, gpu):
    """The network comes from the device, text encoders and VAE are on the host."""
    teacher = load(folders("sd"))
    teacher.denoiser.to(gpu)
    student = disturbed(schedulers.student(teacher, 2, None, True, Adapter(rank=2))).to(gpu).eval()
    monkeypatch.setattr("students.export.folder.verify", lambda *_: None)  # another process
    export(student, teacher, tmp_path / "student", {})
    compared = []
    monkeypatch.setattr(
        formats, "drawn_elsewhere", lambda *_: dict.fromkeys(("0 1", "0 2", "1 1", "1 2"))
    )
    monkeypatch.setattr(formats, "compare", lambda ours, *_: compared.append(ours) or 0.0)
    lora_files.export_lora(student, teacher, tmp_path / "student", tmp_path / "lora")
    prompts, _ = request(student, teacher)
    with torch.no_grad():
        wanted = [pictures(student, teacher, k, prompts) for k in (1, 2)]
    for one, other in zip(compared[::2], wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
    assert where([unwrap(student.denoiser)]) == {gpu.type}  # where it was


# ---- mix-ups that are planted, each in code that every step runs


def grid_of_the_host(self, x):
    grid = torch.linspace(1, 0, 5)
    i = torch.randint(4, (len(x),), device=x.device)
    return grid[i], (grid[i] + grid[i + 1]) / 2, grid[i + 1]


def logged(loss):
    def reads(self, batch, step):
        found = loss(self, batch, step)
        return found._replace(value=found.value * float(found.value.detach() > -1))

    return reads


PLANTED = {
    "a grid without a device": ("step_times", grid_of_the_host, "a host tensor|same device"),
    "a loss that the host reads": (
        "loss",
        logged(Progressive.loss),
        "host waits|synchronizing",
    ),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_mix_up_in_an_objective_is_caught(case, pipelines, tmp_path, monkeypatch):
    name, planted, said = PLANTED[case]
    engine = made(recipe_tree("progressive", pipelines["edm"]), tmp_path / "run")
    monkeypatch.setattr(Progressive, name, planted)
    with pytest.raises(RuntimeError, match=said):
        play(engine)
