"""Students of single files: trained, planned, and exported with LoRA files that fit the file."""

import pytest
import torch
from safetensors.torch import save_file

from distill.config.recipe import Recipe
from distill.planning import forecast
from distill.training import build
from students import schedulers
from students.export.folder import export
from students.export.formats import single_file
from students.export.lora_files import DIFFUSERS, TURBO, export_lora
from students.export.unquantised import base_folder, unquantised, with_file_weights
from students.lora import Adapter, unwrap
from teachers import load
from tests.helpers import families, formats, lora_formats, single_files
from tests.helpers.disturbed import disturbed
from tests.helpers.engines import stream

OPTIONS = families.OPTIONS["flux-dev"]


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A file of Stable Diffusion, a LoRA file for it, and a folder with other weights."""
    root = tmp_path_factory.mktemp("sd")
    pipe = formats.sd15(root / "words")
    state = {k: v.contiguous().clone() for k, v in single_file(pipe).items()}
    save_file(state, root / "model.safetensors")
    layers = lora_formats.layers_of(pipe.unet, r".*attn\d\.to_v")
    pairs = lora_formats.factors(pipe.unet, layers)
    lora_formats.save(lora_formats.peft(pairs, "unet"), root / "style.safetensors")
    for weight in pipe.unet.parameters():  # as a folder of another fine-tune
        weight.data.mul_(1.5)
    pipe.save_pretrained(root / "other")
    return root


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A file of FLUX.1's network alone, by its original names, and the folder with the rest."""
    root = tmp_path_factory.mktemp("flux")
    folder = families.build("flux-dev", root / "flux")
    pipe = load(str(folder), **OPTIONS).codec.pipe
    state = {f"{single_files.NETWORK}{k}": v for k, v in single_files.network(pipe).items()}
    single_files.save(state, root / "flux.safetensors")
    (root / "prompts.txt").write_text("a cat\na dog\nan owl\n")
    return root


def loaded(sd, **options):
    return load(str(sd / "model.safetensors"), config=str(sd / "other"), **options)


def adapters(sd):
    return [{"file": str(sd / "style.safetensors"), "strength": 0.5}]


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_a_lora_is_added_to_the_files_weights_and_not_to_the_settings_folders(sd, precision):
    """Which has the same names. At the end of a run, it is added once."""
    half = "bf16" if precision == "nf4" else precision
    expected = loaded(sd, adapters=adapters(sd), precision="fp32").denoiser.backbone.state_dict()
    teacher = loaded(sd, adapters=adapters(sd), precision=precision)
    if precision == "nf4":
        student = schedulers.student(teacher, 2, None, True, Adapter(rank=2)).eval()
        found = unwrap(unquantised(student, teacher).denoiser).backbone
    else:
        found = teacher.denoiser.backbone
    name = next(k for k in expected if k.endswith("attn1.to_v.weight"))
    plain = loaded(sd, precision=half).denoiser.backbone.state_dict()[name].float()
    distance = (found.state_dict()[name].float() - expected[name]).norm() / expected[name].norm()
    assert distance < 4e-3 < (plain - expected[name]).norm() / expected[name].norm()


@pytest.mark.slow
def test_the_base_of_its_lora_files_is_the_file(sd, tmp_path):
    """Stock diffusers loads the base from a folder, which is written without the user's LoRA."""
    teacher = loaded(sd, adapters=adapters(sd))
    folder = base_folder(teacher, {"unet"}, tmp_path)
    from diffusers import UNet2DConditionModel

    made = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    plain = loaded(sd).denoiser.backbone.state_dict()
    assert all(torch.equal(made[k], v) for k, v in plain.items())
    student = disturbed(schedulers.student(teacher, 2, None, True, Adapter(rank=2))).eval()
    alone = with_file_weights(student, teacher, torch.float32, fused=False)
    both = with_file_weights(student, teacher, torch.float32)
    x, t, cond = torch.randn(1, *teacher.shape), torch.ones(1), teacher.codec.condition(["a"])
    with torch.no_grad():
        expected = student.denoiser(x, t, cond)
        torch.testing.assert_close(both.denoiser(x, t, cond), expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(alone.denoiser(x, t, cond), expected, atol=1e-3)


@pytest.mark.slow
def test_its_lora_files_draw_in_stock_diffusers(sd, tmp_path):
    """LoRA files of a single file's student, on that file's weights, in another process."""
    teacher = loaded(sd, adapters=adapters(sd))
    student = disturbed(schedulers.student(teacher, 2, None, True, Adapter(rank=2))).eval()
    export(student, teacher, tmp_path / "student", {})
    export_lora(student, teacher, tmp_path / "student", tmp_path / "lora")
    names = {p.name for p in (tmp_path / "lora").glob("*.safetensors")}
    assert {DIFFUSERS, TURBO[DIFFUSERS]} <= names


def tree(flux, **train):
    return {
        "teacher": {"source": str(flux / "flux.safetensors"), "config": str(flux / "flux"),
                    **OPTIONS},
        "student": {"steps": 2},
        "objective": {"name": "dmd2", "student_every": 2},
        "adapters": {"rank": 2},
        "data": {"prompts": str(flux / "prompts.txt")},
        "train": {"steps": 2, "batch": 2, "sample_every": 0, **train},
    }  # fmt: skip


@pytest.mark.slow
def test_a_run_of_a_file_of_flux_is_planned_and_trains(flux, tmp_path):
    """A plan, two steps and a resumed run on FLUX.1's single file."""
    recipe = Recipe.check(tree(flux))
    plan = forecast.plan(recipe)
    run = build.build(recipe, tmp_path / "run")
    held = 4 * sum(p.numel() for p in run.teacher.denoiser.parameters())
    assert held <= plan.weights < 1.3 * held  # one base, and two adapters
    before = {k: [p.clone() for p in v.params] for k, v in run.engine.players.items()}
    data = stream(run.engine)
    for _ in range(2):
        logs = run.engine.advance(data)
        assert all(torch.isfinite(v) for v in logs.values())
    data.close()
    for player, was in before.items():
        assert any(not torch.equal(a, b) for a, b in zip(was, run.engine.players[player].params))


@pytest.mark.slow
def test_a_student_of_a_file_of_flux_is_drawn_by_stock_diffusers(flux, tmp_path):
    """The exported folder and the LoRA file of a student of FLUX.1's single file."""
    teacher = load(str(flux / "flux.safetensors"), config=str(flux / "flux"), **OPTIONS)
    student = disturbed(schedulers.student(teacher, 2, None, True, Adapter(rank=2))).eval()
    export(student, teacher, tmp_path / "student", {})
    export_lora(student, teacher, tmp_path / "student", tmp_path / "lora")
    assert (tmp_path / "lora" / DIFFUSERS).exists()
