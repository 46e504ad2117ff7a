"""One-pass students: the halves of a UNet, the decoder at all times at once, and their exports."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from torch.utils.flop_counter import FlopCounterMode

from distill.config.recipe import Recipe
from distill.planning.forecast import smaller_of
from distill.training.networks import build_networks
from students.architecture.change import changed, changed_teacher
from students.architecture.one_pass import decoder_settings, shares
from students.checkpointing import checkpointing
from students.export import folder as folders
from students.lora import network_of
from students.schedulers import student as student_of
from teachers import load
from teachers.compiled import compile_modules, compiled_forward
from teachers.denoiser import PREDICTIONS
from teachers.errors import UserError
from teachers.reduced import one_pass as reduced
from teachers.reduced.network import SHARES, TIMES
from teachers.reduced.one_pass import OnePassUNet2DConditionModel, Split, tiled
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree


@pytest.fixture(scope="module")
def shapes():
    """The embedded text teacher, noise (3, ...) and the conditions of three captions."""
    teacher = load("shapes")
    rng = torch.Generator().manual_seed(0)
    cond = teacher.codec.condition(["a red circle", "a blue square", "a green triangle"])
    return teacher, torch.randn(3, *teacher.shape, generator=rng), cond


def one_pass(teacher, count, **change):
    """The teacher with a network whose decoder runs `count` times; also for a count of 1."""
    network = network_of(teacher.denoiser)
    decoder = decoder_settings(network, count)
    made = changed(network.backbone, change, {}, [], decoder=decoder)
    return replace(teacher, denoiser=network.twin(made.eval(), network.schedule))


def in_turn(backbone, config, z, text, count):
    """x̂ (B, ...) of diffusers' DDIM, one decoder after the other, and its settings."""
    split = Split(backbone)
    scheduler = DDIMScheduler.from_config(
        config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    scheduler.set_timesteps(count)
    x, kept = z, split.encode(z, scheduler.timesteps[0], text)
    for t in scheduler.timesteps:
        output = split.decode(kept, z, t, text, return_dict=False)[0]
        x = scheduler.step(output, t, x).prev_sample
    return x


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"mid_block_type": None}])
def test_the_halves_are_the_whole(shapes, change):
    teacher, z, cond = shapes
    backbone = changed(teacher.denoiser.backbone, change, {}, []).eval()
    split, t = Split(backbone), torch.tensor([999.0, 500.0, 3.0])
    kept = split.encode(z, t, cond["text"])
    halves = split.decode(kept, torch.zeros_like(z), t, cond["text"]).sample
    assert torch.equal(halves, backbone(z, t, cond["text"]).sample)
    assert not any("forward" in vars(m) or m._forward_hooks for m in backbone.modules())
    compile_modules([*backbone.down_blocks, *backbone.up_blocks])  # their own forwards come back
    again = split.decode(split.encode(z, t, cond["text"]), z, t, cond["text"]).sample
    assert torch.equal(again, halves) and compiled_forward(backbone.up_blocks[0]) is not None
    assert compiled_forward(backbone.down_blocks[1]) is not None


@torch.no_grad()
def test_the_halves_of_a_network_with_added_conditions_are_the_whole(folders):
    network = network_of(load(folders("sdxl")).denoiser)
    backbone, split = network.backbone, Split(network.backbone)
    config = backbone.config
    torch.manual_seed(0)
    z = torch.randn(2, config.in_channels, *[config.sample_size] * 2)
    text = torch.randn(2, 7, config.cross_attention_dim)
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(2, width), "time_ids": torch.randn(2, 6)}
    whole = backbone(z, 700, text, added_cond_kwargs=added).sample
    kept = split.encode(z, 700, text, added_cond_kwargs=added)
    assert torch.equal(split.decode(kept, z, 700, text, added_cond_kwargs=added).sample, whole)


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 4, 5])
def test_all_times_at_once_are_diffusers_ddim_one_after_the_other(shapes, count):
    teacher, z, cond = shapes
    backbone, config = teacher.denoiser.backbone, teacher.denoiser.schedule.config
    made = one_pass(teacher, count).denoiser
    x = made(z, torch.ones(3), cond)
    assert torch.allclose(x, in_turn(backbone, config, z, cond["text"], count), atol=3e-6)
    # and one prompt's x̂ does not depend on the others of its batch
    alone = made(z[1:2], torch.ones(1), {k: v[1:2] for k, v in cond.items()})
    assert torch.allclose(x[1:2], alone, atol=3e-6)


@torch.no_grad()
def test_a_batch_that_is_tiled_the_other_way_is_seen(shapes, monkeypatch):
    teacher, z, cond = shapes
    made = one_pass(teacher, 4).denoiser
    right = made(z, torch.ones(3), cond)

    def interleaved(value, n, size):
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == size:
            return value.repeat_interleave(n, 0)
        if isinstance(value, list | tuple):
            return type(value)(interleaved(v, n, size) for v in value)
        return value

    monkeypatch.setattr(reduced, "tiled", interleaved)
    assert (made(z, torch.ones(3), cond) - right).abs().max() > 0.3


@torch.no_grad()
def test_one_time_is_the_ordinary_network(shapes):
    teacher, z, cond = shapes
    settings = decoder_settings(teacher.denoiser, 1)
    assert settings == {TIMES: [999.0], SHARES: [0.0, 1.0]}
    ours = one_pass(teacher, 1).denoiser(z, torch.ones(3), cond)
    assert torch.equal(ours, teacher.denoiser(z, torch.ones(3), cond))


def test_shares_of_predicted_noise_have_a_closed_form(shapes):
    """DDIM from σ/α = r to r' moves x/α by (r' - r) ε, so x̂ = (z - σ Σ shares ε) / α."""
    process, times = shapes[0].denoiser.process, [1.0, 0.75, 0.5, 0.25]
    own, *others = shares(process, PREDICTIONS["eps"], times)
    alpha, sigma = process.scales(torch.tensor(times, dtype=torch.float64))
    r = torch.cat([sigma / alpha, torch.zeros(1, dtype=torch.float64)])
    assert own == pytest.approx(0, abs=1e-12)
    assert others == pytest.approx((-r.diff() / r[0]).tolist(), rel=1e-9)
    # of equal predictions of x, the last alone counts
    own, *others = shares(process, PREDICTIONS["x"], times)
    assert (own, others) == (0, pytest.approx([0, 0, 0, 1], abs=1e-12))


def test_gradients_are_those_of_the_decoders_in_turn_also_recomputed(shapes):
    teacher, z, cond = shapes
    config = teacher.denoiser.schedule.config

    def gradients(backbone, x):
        backbone.zero_grad()
        (x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum().backward()
        return {k: p.grad.clone() for k, p in backbone.named_parameters()}

    whole = changed(teacher.denoiser.backbone, {}, {}, []).requires_grad_(True)
    want = gradients(whole, in_turn(whole, config, z, cond["text"], 2))
    made = one_pass(teacher, 2).denoiser
    made.requires_grad_(True)
    for again in (False, True):
        if again:
            checkpointing(made.backbone)
        found = gradients(made.backbone, made(z, torch.ones(3), cond))
        for key, value in want.items():
            assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-4), key


def test_what_is_no_batch_is_not_tiled():
    value = {"a": (torch.arange(2), 0.5, None), "b": torch.tensor(3), "c": torch.arange(5)}
    found = tiled(value, 2, 2)
    assert found["a"][0].tolist() == [0, 1, 0, 1] and found["a"][1:] == (0.5, None)
    assert found["b"] == 3 and found["c"].tolist() == [0, 1, 2, 3, 4]


@torch.no_grad()
def test_four_times_are_less_work_than_four_calls(shapes):
    teacher, z, cond = shapes
    work = []
    for denoiser in (one_pass(teacher, 4).denoiser, teacher.denoiser):
        with FlopCounterMode(display=False) as counter:
            denoiser(z, torch.ones(3), cond)
        work.append(counter.get_total_flops())
    assert work[0] / (4 * work[1]) == pytest.approx(0.73, abs=0.01)


def recipe(**more):
    tree = {**recipe_tree("dmd2", "shapes"), "teacher": {"source": "shapes"}}
    tree["data"] = {"source": "shapes"}
    return {**tree, "student": {"architecture": {"decoder_times": 4}}, **more}


def test_the_student_alone_is_one_pass_and_leaves_as_a_folder_of_its_own(shapes, tmp_path):
    checked = Recipe.check(recipe())
    teacher = load("shapes")
    networks = build_networks(checked, teacher)
    student = networks["student"]
    assert isinstance(network_of(student.denoiser).backbone, OnePassUNet2DConditionModel)
    fake = network_of(networks["fake"]).backbone
    assert not isinstance(fake, OnePassUNet2DConditionModel)
    folders.export(student, teacher, tmp_path / "student", checked.tree())  # compares pixels
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    kind = OnePassUNet2DConditionModel.__name__
    assert index["unet"] == [kind.lower(), kind] and student.counts == (1,)
    generator, _ = folders.load_student(tmp_path / "student")
    _, z, cond = shapes
    with torch.no_grad():
        assert torch.equal(generator(z, cond), student(z, cond))
    # it is what another student may start as
    again = Recipe.check({**recipe(), "student": {"init": str(tmp_path)}})
    after = build_networks(again, load("shapes"))["student"]
    assert network_of(after.denoiser).backbone.config[TIMES] == [999.0, 749.0, 499.0, 249.0]


def test_a_plan_knows_its_work(shapes):
    teacher, z, cond = shapes

    class Trained:
        student = student_of(changed_teacher(teacher, {}, {}, [], decoder_times=4))

    class Items:
        noise = z

    Items.cond = cond
    weights, share = smaller_of(Recipe.check(recipe()), teacher, Trained, Items)
    assert weights == 1_784_644 and share == pytest.approx(4 * 0.73, abs=0.04)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"student": {"steps": 4, "architecture": {"decoder_times": 4}}}, "decoder_times"),
        ({"adapters": {}}, "student.architecture"),
        (recipe_tree("lcm", "shapes"), "decoder_times"),
        (recipe_tree("progressive", "shapes"), "decoder_times"),
        (recipe_tree("reflow", "shapes"), "decoder_times"),
        ({"objective": {"name": "dmd2", "schedule": {"longest": 4}}}, "objective.schedule"),
        ({"objective": {"name": "dmd2", "alignment": {}}}, "objective.alignment"),
        ({"critic": {"reads": "student"}}, "decoder_times"),
        ({"train": {"steps": 1, "batch": 2, "compile": "full"}}, "decoder_times"),
    ],
)
def test_what_calls_it_at_other_times_is_refused(more, key):
    tree = recipe()
    if "student" not in more or "objective" in more:
        more = {**more, "student": tree["student"]}
    with refused(f"*{key}"):
        Recipe.check({**tree, **more})


@pytest.mark.parametrize(
    ("source", "count", "word"),
    [("digits", 4, "UNet2DModel"), ("dit", 4, "DiT"), ("shapes", 3, "does not divide")],
)
def test_networks_without_such_halves_are_refused(source, count, word, folders):
    teacher = load(folders(source) if source == "dit" else source)
    with pytest.raises(UserError) as error:
        changed_teacher(teacher, {}, {}, [], decoder_times=count)
    assert error.value.key.endswith("decoder_times") and word in str(error.value)
