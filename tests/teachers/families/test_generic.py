"""Pipelines on the generic adapter: the stock pipelines' own numbers, in both directions."""

from __future__ import annotations

import inspect
import json
import math
import shutil

import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler

from distill.planning.doctor import diagnose, pictures_for, verdict
from students import Critic, schedulers
from students.export.folder import export, load_student, rehearse, request, sample_student
from students.lora import Adapter
from students.two_time import channels, time_layers
from teachers import load
from teachers.catalogue.outlines import outline
from teachers.denoiser import Guided
from teachers.process import Linear
from teachers.solver import ddim
from tests.helpers import families
from tests.helpers.command_line import called
from tests.helpers.disturbed import disturbed
from tests.helpers.doctor import first_broken
from tests.helpers.refusals import refused
from tests.helpers.stock_calls import check, time_of

NAMES = tuple(families.RECENT)
# Whose own scheduler takes one plain Euler step at a time; HiDream's is UniPC, HunyuanDiT's DDPM.
EULER = tuple(name for name in NAMES if name not in ("hidream", "hunyuan"))
SLOW = pytest.mark.slow
PROMPTS = ["a red circle", "two boats on a lake"]
GUIDED = {  # how each stock pipeline is asked for guidance of 3; FLUX.2 dev has none
    **{name: {"guidance_scale": 3.0} for name in NAMES},
    "krea2": {"guidance_scale": 2.0},  # counts from 0
    "longcat": {"guidance_scale": 3.0, "enable_cfg_renorm": False},
}


def some(chosen):
    """These families in every run, the others in the slow one."""
    return [name if name in chosen else pytest.param(name, marks=SLOW) for name in NAMES]


@pytest.fixture
def opened(folders):
    """The small teacher, with weights far enough from their first values that all inputs count."""

    def teacher(name, by=0.05, **more):
        made = load(folders(name), **families.OPTIONS.get(name, {}), **more)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in made.denoiser.parameters():
                p.add_(by * torch.randn_like(p))
        return made

    return teacher


def stepped(teacher, monkeypatch, steps=3, **more):
    """What the stock pipeline hands to its scheduler at each step, and what it returns."""
    pipe, seen = teacher.codec.pipe, []
    pipe.set_progress_bar_config(disable=True)
    step = pipe.scheduler.step

    def note(out, t, x, *args, **kwargs):
        seen.append((out.clone(), float(t), x.clone()))
        return step(out, t, x, *args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", note)
    rng = torch.Generator().manual_seed(0)
    arguments = teacher.codec.arguments([*PROMPTS]) | {"output_type": "pt"} | more
    out = pipe(num_inference_steps=steps, generator=rng, **arguments)
    return seen, next(iter(out.values()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adapter", [None, Adapter(rank=4)], ids=["full", "lora"])
def test_a_stock_pipeline_samples_the_student(opened, name, adapter):
    teacher = opened(name)
    student = schedulers.student(teacher, 2, None, adapter is None, adapter)
    rehearse(disturbed(student).eval(), teacher)


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_fed_as_its_pipeline_feeds_it_at_every_size(opened, name, monkeypatch):
    teacher = opened(name)
    side = teacher.codec.size[-1]
    check(teacher, side, side if teacher.denoiser.SQUARE else 2 * side, monkeypatch)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_step_is_the_pipelines(opened, name, guided, monkeypatch):
    """x̂ is what the scheduler makes of the pipeline's own prediction, to 1e-5."""
    if guided and name == "flux2-dev":
        pytest.skip("its pipeline never guides")
    teacher = opened(name, by=0.2)
    steps, _ = stepped(teacher, monkeypatch, **GUIDED[name] if guided else {})
    denoiser = Guided(teacher.denoiser, 3.0 if guided else 1.0, teacher.codec.null)
    cond = teacher.codec.condition(PROMPTS)
    for out, index, x_t in steps[:2]:
        out, x_t = (teacher.denoiser.unpack(v, teacher.shape) for v in (out, x_t))
        t = time_of(teacher, index).expand(2)
        alpha, sigma = denoiser.process.at(t, x_t)
        if isinstance(denoiser.process, Linear):
            theirs = x_t - sigma * out
        else:  # v-prediction
            theirs = alpha * x_t - sigma * out
        ours = denoiser(x_t, t, cond)
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
        assert (sigma * out).abs().max() > 1e-2 * theirs.abs().max()  # the network has a say
    if guided:
        assert (teacher.denoiser(x_t, t, cond) - ours).abs().max() > 1e-3


@pytest.mark.parametrize("name", EULER)
@torch.no_grad()
def test_our_solver_draws_the_teachers_own_pictures(opened, name, monkeypatch):
    """At the pipeline's own times, with its own scheduler."""
    teacher = opened(name)
    steps, theirs = stepped(teacher, monkeypatch)
    z = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    times = torch.cat([time_of(teacher, index) for _, index, _ in steps])
    x = ddim(teacher.denoiser, z, times, teacher.codec.condition(PROMPTS))
    ours = (teacher.codec.decode(x) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", [*EULER, "hidream"])
def test_the_shift_is_the_pipelines_own(folders, tmp_path, name, monkeypatch):
    """Of 50 steps and this size: the noise of the second step is our process's."""
    folder = folders(name)
    if name == "hidream":  # with the other of its published schedulers
        folder = shutil.copytree(folder, tmp_path / "t")
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.1)
        scheduler.save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"][1] = type(scheduler).__name__
        (folder / "model_index.json").write_text(json.dumps(index))
    teacher = load(str(folder), **families.OPTIONS.get(name, {}))
    pipe = teacher.codec.pipe
    taken = []
    step = pipe.scheduler.set_timesteps

    class Enough(Exception):
        pass

    def note(*args, **kwargs):
        step(*args, **kwargs)
        taken.append(pipe.scheduler.sigmas[1].item())
        raise Enough

    note.__signature__ = inspect.signature(step)
    monkeypatch.setattr(pipe.scheduler, "set_timesteps", note)
    with pytest.raises(Enough):
        pipe(**teacher.codec.arguments([*PROMPTS]), num_inference_steps=50)
    process = teacher.denoiser.process
    second = torch.tensor(0.98, dtype=torch.float64)
    if teacher.denoiser.GRID == "own":  # from 1 to the least noise of training, shifted again
        least = torch.tensor(1e-3, dtype=torch.float64)
        if not pipe.scheduler.config.use_dynamic_shifting:
            least = process.scales(least)[1]
        second = 1 - (1 - least) / 49
    assert taken[0] == pytest.approx(process.scales(second)[1].item(), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_conditions_are_as_long_for_every_prompt_and_depend_on_it_alone(opened, name):
    codec = opened(name).codec
    prompts = ["a", "a red circle on the left of two squares"]
    both, null = codec.condition(prompts), codec.null
    lengths = {"ernie": ("text_bth", "text_lens")}.get(name)
    for i, prompt in enumerate(prompts):
        for key, value in codec.condition([prompt]).items():
            assert value.shape[1:] == both[key].shape[1:] == null[key].shape[1:]
            torch.testing.assert_close(value[0], both[key][i], atol=1e-5, rtol=1e-5)
    different = [k for k, v in both.items() if not torch.equal(v[0], v[1])]
    assert different and (lengths is None or set(lengths) == set(different))


@pytest.mark.parametrize("name", NAMES)
def test_every_adapter_weight_learns_and_a_critic_reads_the_middle(opened, name):
    teacher = opened(name)
    student = schedulers.student(teacher, 2, None, True, Adapter(rank=2))
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn_like(p)).requires_grad_(True)
    cond = teacher.codec.condition(PROMPTS)
    student(torch.randn(2, *teacher.shape), cond, 1).square().sum().backward()
    weights = student.denoiser.trainable()
    still = [k for k, p in weights.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert len(weights) > 20
    assert not still, still
    one = {k: v[:1] for k, v in cond.items()}
    critic = Critic(teacher.denoiser, teacher.shape, one, (teacher.denoiser.middle,))
    x_t, t = torch.randn(2, *teacher.shape), torch.tensor([0.3, 0.6])
    (feature,) = critic.features(x_t, t, cond)
    assert feature.shape[0] == 2 and critic(x_t, t, cond).shape == (2,)


@pytest.mark.parametrize("name", some({"chroma"}))
def test_the_doctor_finds_nothing_wrong(opened, name):
    """The doctor passes each family on the generic adapter."""
    teacher = opened(name)
    checks = diagnose(teacher, pictures_for(teacher, None), structure_only=True)
    assert {c.verdict for c in checks} == {"ok", "left out"}, first_broken(checks)
    assert verdict(checks).startswith("passed: ")


@pytest.mark.parametrize("name", some({"chroma"}))
def test_an_exported_student_is_read_back(opened, name, tmp_path):
    """Each family's student in another process of stock diffusers, and read back by us."""
    teacher = opened(name)
    student = disturbed(schedulers.student(teacher, 2, None, True, Adapter(rank=4))).eval()
    export(student, teacher, tmp_path / "student", {})
    again, _ = load_student(tmp_path / "student")
    prompts = request(student, teacher)[0]
    mine, theirs = (sample_student(g.at(2), teacher, prompts, 0) for g in (student, again))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["flux2-klein", "ernie"])
@torch.no_grad()
def test_latents_are_cells_normalised_by_the_batch_norm(opened, name):
    """As FLUX.2's pipeline encodes the pictures that it edits; ERNIE's only decodes."""
    teacher = opened(name)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    x = teacher.codec.encode(images)
    assert x.shape == (2, *teacher.shape)
    if name == "flux2-klein":
        theirs = teacher.codec.pipe._encode_vae_image(images, None)
        torch.testing.assert_close(x, theirs, atol=1e-5, rtol=1e-5)
    shift, scale = teacher.codec.affine(x)
    raw = teacher.codec.pipe._patchify_latents(teacher.codec.vae.encode(images).latent_dist.mode())
    torch.testing.assert_close((raw - shift) * scale, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_landing_times_are_added_to_the_embedding_of_the_time(folders, name):
    network = load(folders(name), **families.OPTIONS.get(name, {})).denoiser
    if name == "chroma":  # one small network gives every block its shifts
        with refused("student", "Chroma"):
            time_layers(network)
        return
    (layer,) = time_layers(network)
    assert channels(dict(network.backbone.named_modules())[layer]) == 32


def test_times_are_counted_in_the_schedulers_own_units(folders, tmp_path, monkeypatch):
    """Krea's pipeline divides by num_train_timesteps, Chroma's by 1000."""
    for name in ("krea2", "chroma"):
        copy = shutil.copytree(folders(name), tmp_path / name)
        config = copy / "scheduler" / "scheduler_config.json"
        changed = json.loads(config.read_text()) | {"num_train_timesteps": 500}
        config.write_text(json.dumps(changed))
        teacher = load(str(copy), **families.OPTIONS.get(name, {}))
        side = teacher.codec.size[-1]
        check(teacher, side, side, monkeypatch)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("chroma", {"size": 18}, ("teacher '*'", "4")),
        ("flux2-klein", {"size": 18}, ("teacher '*'", "4")),
        ("flux2-klein", {"embedded_guidance": 2.0}, ("teacher '*'", "embedded_guidance")),
        ("auraflow", {"embedded_guidance": 2.0}, ("teacher '*'", "embedded_guidance")),
        ("hunyuan", {"size": 24}, ("teacher '*'", "16")),
        ("hidream", {"size": 64}, ("size", "128")),
    ],
)
def test_options_that_a_family_cannot_follow_are_refused(folders, name, options, reason):
    with refused(*reason):
        load(folders(name), **options)


@pytest.mark.parametrize(
    ("source", "billions", "tiny"),
    [("FLUX.2-dev", 32.2, "flux2-dev"), ("FLUX.2-klein-base-4B", 3.88, "flux2-klein")],
)
def test_outlines_have_the_published_size_and_the_pipelines_conditions(
    folders, source, billions, tiny
):
    known = outline(f"black-forest-labs/{source}", torch.device("meta"))
    parameters = sum(p.numel() for p in known.denoiser.parameters())
    assert parameters == pytest.approx(1e9 * billions, rel=0.005)
    assert known.denoiser.process.shift == pytest.approx(math.exp(2.0232), rel=1e-3)
    small = load(folders(tiny), size=32).codec.condition(["a"])
    assert {k: v.ndim for k, v in known.codec.condition(["a"]).items()} == {
        k: v.ndim for k, v in small.items()
    }


def test_a_run_is_planned(folders, tmp_path, capsys):
    recipe = {
        "teacher": {"source": folders("flux2-klein"), "size": 32},
        "student": {"steps": 2},
        "objective": {"name": "dmd2"},
        "adapters": {"rank": 4},
        "data": {"prompts": str(tmp_path / "prompts.txt")},
        "train": {"steps": 5, "batch": 2},
    }
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code, out, err = called(capsys, "plan", tmp_path / "recipe.yaml")
    assert code == 0, err
    assert "GB" in out or "MB" in out


def test_embedded_guidance_is_what_the_stock_pipeline_takes_by_default(folders):
    cond = load(folders("flux2-dev"), size=32).codec.condition(["a"])
    assert cond["guidance"].tolist() == [4.0]
    assert "guidance" not in load(folders("flux2-klein"), size=32).codec.condition(["a"])


def test_long_prompts_are_counted_and_cut_where_the_pipeline_cuts_them(opened):
    from teachers.pipelines.ernie import TOKENS

    codec = opened("ernie").codec
    with codec.counting() as cuts:
        cond = codec.condition(["a" * (TOKENS + 9), "b"])
    assert cond["text_lens"].tolist() == [TOKENS, 1]
    assert [cut.prompts for cut in cuts.encoders.values()] == [1]
