"""What a network is told of a picture's height and width is the bucket's own, for every family."""

import json
import re

import diffusers
import pytest
import torch

from distill.data import from_recipe
from students import Critic
from students.schedulers import student
from teachers import load
from teachers.denoiser import Guided
from tests.helpers import families
from tests.helpers.datasets import folder_of, recipe
from tests.helpers.refusals import refused
from tests.helpers.stock_calls import check, spy, stock_calls

WIDE = [name for name in families.FAMILIES if name != "dit"]  # whose pipeline draws squares alone


@pytest.fixture
def opened(folders):
    return lambda name, **more: load(str(folders(name)), **families.OPTIONS.get(name, {}) | more)


@pytest.mark.parametrize("name", WIDE)
def test_a_bucket_is_fed_as_the_stock_pipeline_feeds_pictures_of_its_size(
    opened, name, monkeypatch
):
    teacher = opened(name)
    side = teacher.codec.size[-1]
    told = check(teacher, side, 2 * side, monkeypatch)
    if name == "sdxl":
        sizes = told[".added_cond_kwargs.time_ids"]
        assert sizes.tolist() == [[side, 2 * side, 0, 0, side, 2 * side]] * 2
    if name == "pixart-alpha":
        assert told[".added_cond_kwargs.resolution"].tolist() == [[side, 2 * side]] * 2
        assert told[".added_cond_kwargs.aspect_ratio"].tolist() == [[0.5]] * 2


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "lumina", "qwen", "zimage", "wan"])
def test_times_are_counted_in_the_schedulers_own_units(folders, name, tmp_path, monkeypatch):
    """Pipelines divide by 1000, by num_train_timesteps, or not at all."""
    import shutil

    copy = shutil.copytree(folders(name), tmp_path / "t")
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_train_timesteps": 500}))
    teacher = load(str(copy), **families.OPTIONS.get(name, {}))
    side = teacher.codec.size[-1]
    check(teacher, side, side, monkeypatch)


@pytest.mark.parametrize("name", ["flux-dev", "sd3", "zimage", "qwen"])
def test_shifts_by_resolution_are_the_pipelines_at_its_size(folders, name, tmp_path, monkeypatch):
    """Of sequences as long as a square's, and of the pipeline's own count of them."""
    import shutil

    copy = shutil.copytree(folders(name), tmp_path / "t")
    config = copy / "scheduler" / "scheduler_config.json"
    changed = {"use_dynamic_shifting": True, "shift_terminal": None, "base_image_seq_len": 4,
               "max_image_seq_len": 64}  # fmt: skip
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    teacher = load(str(copy), **families.OPTIONS.get(name, {}))
    _, _, times = stock_calls(teacher, *teacher.codec.size, monkeypatch)
    process = teacher.denoiser.process
    own = 1000 * process.scales(torch.tensor(0.5, dtype=torch.float64))[1]
    first = times[1] if teacher.denoiser.GRID == "trailing" else None
    if first is None:  # it lets its scheduler choose: from 1 to the smallest that it knows
        sigma = torch.tensor(1 / 1000, dtype=torch.float64)
        own, first = 1000 * process.scales(sigma)[1], times[1]
    assert abs(first - own.item()) < 0.5 and process.shift > 1.2


def bucketed(teacher, tmp_path, side):
    """Batches of two shapes of pictures, by the shape of their latents."""
    folder_of(tmp_path / "a/tall", 4, size=(2 * side, side))
    folder_of(tmp_path / "a/wide", 4, size=(side, 2 * side))
    wanted = {"source": str(tmp_path / "a"), "captions": "folder", "size": 2 * side}
    source = from_recipe.source_of(
        recipe(**wanted, buckets={"multiple": side // 2, "ratio": 3}), teacher
    )
    batches = [source.batch(draw, 0, 1, 2) for draw in range(8)]
    return {tuple(b.data.shape[2:]): b for b in batches}


@pytest.mark.parametrize(
    ("name", "key"), [("sdxl", ".added_cond_kwargs.time_ids"),
                      ("pixart-alpha", ".added_cond_kwargs.resolution")]
)  # fmt: skip
def test_teacher_guidance_student_and_critic_are_told_the_size_of_their_batch(
    opened, name, key, tmp_path
):
    side = 16
    teacher = opened(name, size=2 * side)
    few = student(teacher)
    one = {k: v[:1] for k, v in teacher.codec.condition(["a"]).items()}
    guided = Guided(teacher.denoiser, 2.0, teacher.codec.null)
    critic = Critic(teacher.denoiser, teacher.shape, one, (teacher.denoiser.middle,))
    batches = bucketed(teacher, tmp_path, side)
    assert len(batches) == 2
    for (height, width), batch in batches.items():
        pixels = [height * teacher.denoiser.per_latent, width * teacher.denoiser.per_latent]
        seen = []
        hooks = [spy(n.backbone, seen) for n in (teacher.denoiser, few.denoiser)]
        t = torch.full((2,), 0.5)
        with torch.no_grad():
            teacher.denoiser(batch.noise, t, batch.cond)
            guided(batch.noise, t, batch.cond)
            few(batch.noise, batch.cond)
            assert critic(batch.noise, t, batch.cond).shape == (2,)
        for hook in hooks:
            hook.remove()
        assert len(seen) == 4 and len(seen[1][1][key]) == 4  # both halves of guidance
        for _, given in seen:
            assert given[key][:, :2].tolist() == [pixels] * len(given[key])


def test_buckets_must_fill_the_networks_patches(opened, tmp_path):
    """Of FLUX's, 2×2 latents; the codec alone would take half of that."""
    teacher = opened("flux-schnell")
    assert teacher.denoiser.per_latent == 2
    folder_of(tmp_path / "a", 4)
    for data, key in (({"buckets": {"multiple": 6}}, "buckets.multiple"), ({"size": 22}, "size")):
        with refused(re.compile(r"data\.buckets\.multiple|data\.size"), "4", key):
            from_recipe.source_of(recipe(source=str(tmp_path / "a"), **data), teacher)


def test_a_pipeline_of_squares_is_given_no_buckets(opened, tmp_path):
    folder_of(tmp_path / "a/0", 4)
    teacher = opened("dit")
    data = {"source": str(tmp_path / "a"), "buckets": {"multiple": 4}}
    with refused("data.buckets", "DiTPipeline"):
        from_recipe.source_of(recipe(**data), teacher)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_network_that_is_told_of_guidance_is_told_of_none_as_its_pipeline_tells_it(
    folders, name, tmp_path, monkeypatch
):
    """Latent consistency models' networks read an embedding of the scale."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders(name))
    config = {**pipe.unet.config, "time_cond_proj_dim": 6}
    torch.manual_seed(0)
    pipe.unet = diffusers.UNet2DConditionModel.from_config(config)
    pipe.save_pretrained(tmp_path / "t")
    teacher = load(str(tmp_path / "t"))
    side = teacher.codec.size[-1]
    told = check(teacher, side, side, monkeypatch)
    assert told[".timestep_cond"].tolist() == [[0, 0, 0, 1, 1, 1]] * 2


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@torch.no_grad()
def test_a_network_with_a_guidance_input_reads_each_samples_scale(folders, name, tmp_path):
    """As latent consistency models embed it: sines and cosines of 1000 (g - 1)."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders(name))
    torch.manual_seed(0)
    pipe.unet = diffusers.UNet2DConditionModel.from_config(
        {**pipe.unet.config, "time_cond_proj_dim": 7}
    )
    pipe.save_pretrained(tmp_path / "t")
    teacher = load(str(tmp_path / "t"))
    x_t, t, scales = torch.randn(3, *teacher.shape), torch.rand(3), torch.tensor([1.0, 4.5, 8.0])
    cond, seen = teacher.codec.condition(["a", "b", "c"]), []
    own = {**cond, "guidance_scale": scales}
    hook = teacher.denoiser.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep_cond"]), with_kwargs=True
    )
    x, plain = teacher.denoiser(x_t, t, own), teacher.denoiser(x_t, t, cond)
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    assert torch.equal(seen[0], embed(None, scales - 1, 7))
    assert torch.equal(seen[0][0], seen[1][0])  # g = 1 is what it reads where nothing is said
    torch.testing.assert_close(x[:1], plain[:1])
    assert all((x[i] - plain[i]).abs().max() > 1e-5 for i in (1, 2))
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in own.items()}
        alone = teacher.denoiser(x_t[i : i + 1], t[i : i + 1], one)
        torch.testing.assert_close(x[i : i + 1], alone, atol=1e-5, rtol=1e-4)
    seen.clear()
    Guided(teacher.denoiser, 2.0, teacher.codec.null)(x_t, t, own)
    hook.remove()
    assert torch.equal(seen[0], embed(None, torch.zeros(6), 7))  # guided from outside: x̂ of g = 1


def test_a_network_without_one_ignores_a_guidance_scale(opened):
    teacher = opened("sd")
    x_t, t, cond = (
        torch.randn(2, *teacher.shape),
        torch.rand(2),
        teacher.codec.condition(["a", "b"]),
    )
    own = {**cond, "guidance_scale": torch.tensor([2.0, 3.0])}
    assert torch.equal(teacher.denoiser(x_t, t, own), teacher.denoiser(x_t, t, cond))
