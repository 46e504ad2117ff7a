"""Memory on the device before step 0: no more than training takes, and than the plan states."""

import dataclasses

import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from distill import console
from distill.config.recipe import Recipe
from distill.data import encode
from distill.data.cache import Cache
from distill.data.encode import PIXELS, TOGETHER, images_at_once
from distill.data.from_recipe import encoding_job
from distill.planning import forecast
from distill.planning.plan import GPUS, Plan, advice
from distill.training import build
from students import schedulers
from students.export.encoders import RecordedEncoders
from students.export.folder import prompts_of, rehearse
from teachers import load
from teachers.teacher import Pixels, Teacher
from tests.helpers import fake_gpu, families


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """An SDXL whose text encoders have half as many bytes as its network, as the real one's."""
    root = tmp_path_factory.mktemp("memory") / "sdxl"
    torch.manual_seed(0)
    widths = {"block_out_channels": (64, 128)}
    families.sdxl(root, widths, intermediate_size=512, num_hidden_layers=16)
    return root


def recipe_of(folder, prompts, **train):
    prompts.write_text("a cat\na red boat on a lake\ntwo birds\n")
    return Recipe.check({
        "teacher": {"source": str(folder), "guidance": 2.0, "size": 16},
        "objective": {"name": "dmd2", "student_every": 2},
        "student": {"steps": 2},
        "adapters": {"rank": 4},
        "data": {"prompts": str(prompts)},
        "train": {"steps": 2, "batch": 2, "accumulate": 2, "checkpointing": True,
                  "sample_every": 0, **train},
    })  # fmt: skip


@pytest.mark.slow
def test_a_build_holds_no_more_than_the_plan_before_and_in_training(sdxl, tmp_path, monkeypatch):
    """SDXL with adapters and checkpointing on a counted device: at most the plan's bytes."""
    recipe = recipe_of(sdxl, tmp_path / "prompts.txt")
    plan = forecast.plan(recipe)
    peak = sum(int(1e9 * part) for part in plan.parts.values())
    assert plan.weights + plan.beside > peak  # encoders beside the networks would exceed it
    with fake_gpu.installed(monkeypatch), fake_gpu.MemoryMeter() as meter:
        run = build.build(recipe, tmp_path / "run")
        built, meter.most = meter.most, meter.now
        run.engine.train()
        assert plan.weights < plan.build < peak and plan.weights < built <= peak
        assert meter.most <= peak


@pytest.mark.slow
def test_the_bytes_of_a_planned_decoding_are_those_that_it_takes(sdxl, tmp_path, monkeypatch):
    """SDXL's decoder on a counted device: the plan's bytes within a tenth."""
    plan = forecast.plan(recipe_of(sdxl, tmp_path / "prompts.txt"))
    with fake_gpu.installed(monkeypatch), fake_gpu.MemoryMeter() as meter:
        teacher = load(str(sdxl), size=16)
        teacher.codec.to(fake_gpu.GPU)
        teacher.codec.pipe.text_encoder.to("cpu")
        teacher.codec.pipe.text_encoder_2.to("cpu")
        meter.most = meter.now
        teacher.codec.decode(torch.zeros(1, *teacher.shape, device=fake_gpu.GPU))
        assert plan.build - plan.weights == pytest.approx(meter.most, rel=0.1)


def test_text_encoders_are_on_the_device_one_at_a_time_and_compute_once(sdxl, monkeypatch):
    with fake_gpu.installed(monkeypatch), fake_gpu.MemoryMeter() as meter:
        teacher = load(str(sdxl), size=16)
        pipe = teacher.codec.pipe
        sizes = [sum(p.nbytes for p in m.parameters())
                 for m in (pipe.text_encoder, pipe.text_encoder_2)]  # fmt: skip
        encoders = RecordedEncoders(teacher, fake_gpu.GPU)
        encoders.condition(prompts_of(teacher))
        assert max(sizes) < meter.most < sum(sizes)
        student = schedulers.student(teacher, 2).to(fake_gpu.GPU)
        teacher.denoiser.to(fake_gpu.GPU)
        moves = count_moves([pipe.text_encoder, pipe.text_encoder_2], monkeypatch)
        rehearse(student, teacher, encoders)
        assert moves == []
        rehearse(student, teacher)  # nothing is recorded
        assert moves == [pipe.text_encoder, pipe.text_encoder_2]
    for module in (pipe.text_encoder, pipe.text_encoder_2):
        assert "forward" not in vars(module) and not hasattr(module, "_hf_hook")


def count_moves(modules, monkeypatch):
    """The modules, each time that one moves to the GPU."""
    moves, to = [], torch.nn.Module.to

    def moved(self, *args, **kwargs):
        if self in modules and args and torch.device(args[0]) == fake_gpu.GPU:
            moves.append(self)
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", moved)
    return moves


def test_a_rehearsal_decodes_one_image_at_a_time(sdxl, monkeypatch):
    teacher = load(str(sdxl), size=16)
    vae, sizes = teacher.codec.vae, []
    decode = vae.decoder.forward
    monkeypatch.setattr(vae.decoder, "forward", lambda x, *a: sizes.append(len(x)) or decode(x, *a))
    rehearse(schedulers.student(teacher, 2), teacher)
    assert set(sizes) == {1} and not vae.use_slicing


def test_large_images_are_encoded_a_few_at_a_time(sdxl):
    teacher = load(str(sdxl), size=16)
    assert images_at_once(teacher, 64, 64) == TOGETHER
    assert images_at_once(teacher, 512, 512) == PIXELS // 512**2 == 4
    assert images_at_once(teacher, 2048, 1024) == 1
    pixels = Teacher(teacher.denoiser, Pixels(), (3, 2048, 2048), "")
    assert images_at_once(pixels, 2048, 2048) == TOGETHER


def test_latents_of_images_that_are_encoded_in_pieces_have_a_cache_of_their_own(
    sdxl, tmp_path, monkeypatch
):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(5):
        Image.new("RGB", (16, 16), (40 * i, 90, 200)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("a cat")
    tree = {"teacher": {"source": str(sdxl), "size": 16}, "objective": {"name": "consistency"},
            "data": {"source": str(images), "cache": str(tmp_path / "cache")},
            "train": {"steps": 1}}  # fmt: skip
    recipe, teacher = Recipe.check(tree), load(str(sdxl), size=16)
    sizes, encode_once = [], teacher.codec.encode
    monkeypatch.setattr(teacher.codec, "encode", lambda x: sizes.append(len(x)) or encode_once(x))
    whole = encoding_job(recipe, teacher)
    one = whole.encode(whole.listing.items).tensors["x"]
    monkeypatch.setattr(encode, "PIXELS", 2 * 16 * 16)
    pieces = encoding_job(recipe, teacher)
    assert torch.allclose(pieces.encode(pieces.listing.items).tensors["x"], one, atol=1e-5)
    assert sizes == [1, 5, 1, 2, 2, 1]  # each job first encodes a grey image
    cache = Cache(pieces, tmp_path / "cache")
    assert cache.about["images_at_once"] == [2]
    monkeypatch.undo()
    assert "images_at_once" not in Cache(whole, tmp_path / "cache").about


@pytest.mark.slow
def test_a_plan_counts_the_grids_that_are_drawn_between_steps(sdxl, tmp_path, monkeypatch):
    """The memory of grids drawn between steps is that of the plan."""
    recipe = recipe_of(sdxl, tmp_path / "prompts.txt", sample_every=1)
    plan = forecast.plan(recipe)
    decoding = plan.build - plan.weights
    assert plan.grids == plan.weights + plan.optimizer + 2 * plan.average + decoding
    assert plan.most == pytest.approx(max(plan.peak, plan.build / 1e9, plan.grids / 1e9))
    with fake_gpu.installed(monkeypatch), fake_gpu.MemoryMeter() as meter:
        engine = build.build(recipe, tmp_path / "run").engine
        engine.train()
        meter.most = meter.now
        engine.sample()
        assert meter.most == pytest.approx(plan.grids, rel=0.1)


def test_a_plan_that_fits_but_for_its_build_or_its_grids_says_so(sdxl, tmp_path, capsys):
    recipe = recipe_of(sdxl, tmp_path / "prompts.txt")
    card = GPUS["rtx-4090"]
    grids = Plan(int(9e9), 0, 0, 0, int(9e9), 0, 10**9, 8, "bf16", {}, 1e12, grids=int(24e9))
    early = dataclasses.replace(grids, build=int(25e9))
    assert "sample_every" in advice(recipe, grids, card)[0]
    assert "larger card" in advice(recipe, early, card)[0]
    for plan, line in ((grids, "between steps"), (early, "before step 0")):
        tree = plan.tree("rtx-4090", card)
        assert not tree["fits"]
        console.out.print(console.plan_table(tree, card.memory, 1))
        assert line in capsys.readouterr().out
    fitting = dataclasses.replace(grids, grids=0).tree("rtx-4090", card)
    assert fitting["fits"]
    console.out.print(console.plan_table(fitting, card.memory, 1))
    assert "step 0" not in capsys.readouterr().out


FAMILIES = ("sd", "dit", "sd3", "flux-dev", "sana", "qwen", "wan")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_vae_is_planned(name, tmp_path):
    options = families.OPTIONS.get(name, {})
    source = {"source": str(families.build(name, tmp_path / name)), **options}
    tree = {"teacher": source, "objective": {"name": "consistency"}, "train": {"steps": 1}}
    recipe = Recipe.check({**tree, "data": {"source": str(tmp_path)}})
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    teacher = forecast.shape_of(recipe.teacher, fake)
    vae = sum(p.nbytes for p in forecast.fake_vae(teacher, fake).parameters())
    found = forecast.coding(recipe, teacher, fake)
    assert found.decoding > vae
    assert (found.encoding > 0) == (len(teacher.shape) == 3)  # videos are not encoded
