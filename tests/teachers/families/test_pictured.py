"""Pipelines with a picture as a condition: the stock pipelines' own inputs, guidance and pixels."""

from __future__ import annotations

import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from torchvision.utils import save_image

from distill.planning.doctor import diagnose, pictures_for
from students import Critic, schedulers
from students.export.folder import load_student, posterior_modes, prompts_of, rehearse
from students.lora import Adapter
from students.metadata.turbo import architecture
from teachers import load
from teachers.conditions import PICTURE, Pictured
from teachers.denoiser import Guided
from teachers.process import Linear
from tests.helpers import families, families_d
from tests.helpers.command_line import called
from tests.helpers.disturbed import disturbed
from tests.helpers.doctor import first_broken
from tests.helpers.refusals import refused
from tests.helpers.stock_calls import check, time_of

NAMES = tuple(families.PICTURED)
GUIDED = {  # how each stock pipeline is asked for guidance of 3
    **{name: {"guidance_scale": 3.0} for name in NAMES},
    "kontext": {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]},
    "qwen-edit": {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]},
}


@pytest.fixture
def opened(folders, monkeypatch):
    """The small teacher, with weights far enough from their first values that all inputs count.

    Qwen-Image-Edit resizes pictures to fewer pixels than to a megapixel, which would take long.
    """
    real = pipeline_qwenimage_edit.calculate_dimensions
    small = lambda area, ratio: real(area // 256, ratio)  # noqa: E731
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", small)

    def teacher(name, by=0.05, **more):
        made = load(folders(name), **families.OPTIONS.get(name, {}), **more)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in made.denoiser.parameters():
                p.add_(by * torch.randn_like(p))
        return made

    return teacher


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adapter", [None, Adapter(rank=4)], ids=["full", "lora"])
def test_a_stock_pipeline_samples_the_student(opened, name, adapter):
    teacher = opened(name)
    student = schedulers.student(teacher, 2, None, adapter is None, adapter)
    rehearse(disturbed(student).eval(), teacher)


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_fed_as_its_pipeline_feeds_it(opened, name, monkeypatch):
    teacher = opened(name)
    side = teacher.codec.size[-1]
    with posterior_modes(True):
        check(teacher, side, side, monkeypatch)


def one_step(teacher, monkeypatch, **more):
    """What the stock pipeline hands to its scheduler at its first step, and what it returns."""
    pipe, seen = teacher.codec.pipe, []
    pipe.set_progress_bar_config(disable=True)
    if not isinstance(teacher.denoiser.process, Linear):  # SDXL's own scales the input
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    step = pipe.scheduler.step

    def note(out, t, x, *args, **kwargs):
        seen.append((out.clone(), float(t), x.clone()))
        return step(out, t, x, *args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", note)
    prompts = prompts_of(teacher)
    with posterior_modes(True):
        pipe(**teacher.codec.arguments(prompts) | more, num_inference_steps=3, output_type="pt")
    out, index, x_t = seen[0]
    return prompts, *(teacher.denoiser.unpack(v, teacher.shape) for v in (out, x_t)), index


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_picture_stays_in_both_branches_of_guidance(opened, name, guided, monkeypatch):
    """x̂ is what the stock pipeline's prediction comes to, to 1e-5."""
    teacher = opened(name, by=0.2)
    prompts, out, x_t, index = one_step(teacher, monkeypatch, **GUIDED[name] if guided else {})
    denoiser = Guided(teacher.denoiser, 3.0 if guided else 1.0, teacher.codec.null)
    cond = teacher.codec.condition(prompts)
    t = time_of(teacher, index).expand(2)
    alpha, sigma = denoiser.process.at(t, x_t)
    if guided and name == "qwen-edit":  # its pipeline gives each token the unguided norm
        pack, unpack = teacher.denoiser.pack, teacher.denoiser.unpack
        free = pack((x_t - denoiser(x_t, t, cond)) / sigma).norm(dim=-1, keepdim=True)
        out = unpack(pack(out) * free / pack(out).norm(dim=-1, keepdim=True), teacher.shape)
    theirs = x_t - sigma * out  # α times x̂ of ε-networks; a flow's x̂ itself
    ours = denoiser(x_t, t, cond)
    ours = ours if isinstance(denoiser.process, Linear) else alpha * ours
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    if guided:
        other = {**cond, PICTURE: cond[PICTURE].flip(0)}
        plain, away = teacher.denoiser(x_t, t, cond), denoiser(x_t, t, other)
        assert (plain - denoiser(x_t, t, cond)).abs().max() > 1e-3
        assert (away - denoiser(x_t, t, cond)).abs().max() > 1e-4  # the pictures are heard


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_without_a_picture_has_a_grey_one(opened, name):
    codec = opened(name).codec
    _, height, width = 3, *codec.size
    blank = codec.condition([Pictured.blank("a", height, width)])
    for key, value in codec.condition(["a"]).items():
        assert torch.equal(value, blank[key]), key
    assert codec.null[PICTURE].shape == blank[PICTURE].shape


@pytest.mark.parametrize("name", NAMES)
def test_the_doctor_finds_no_fault_in_its_structure(opened, name):
    teacher = opened(name)
    checks = diagnose(teacher, pictures_for(teacher, None), structure_only=True)
    assert first_broken(checks) == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_critic_and_a_fake_read_the_picture(opened, name):
    teacher = opened(name)
    cond = teacher.codec.condition(prompts_of(teacher))
    one = {k: v[:1] for k, v in cond.items()}
    judge = Critic(teacher.denoiser, teacher.shape, one, (teacher.denoiser.middle,))
    x_t, t = torch.randn(2, *teacher.shape), torch.tensor([0.3, 0.6])
    with torch.no_grad():
        logits = judge(x_t, t, cond)
        other = judge(x_t, t, {**cond, PICTURE: cond[PICTURE].flip(0)})
    assert logits.shape == (2,) and (logits - other).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("inpaint", "stable-diffusion-v1"),
        ("inpaint-xl", "stable-diffusion-xl-v1-base"),
        ("kontext", "flux-1-dev"),
        ("qwen-edit", "qwen-image"),
    ],
)
def test_files_name_the_text_to_image_family(opened, name, family):
    teacher = opened(name)
    assert architecture(teacher.denoiser, teacher.codec)[0] == family


def test_a_network_without_the_channels_of_a_mask_is_refused(tmp_path):
    families_d.inpaint(tmp_path, channels=4)
    with refused("teacher '*'", "in_channels is 4", "9"):
        load(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_run_leaves_what_stock_pipelines_draw(folders, name, tmp_path, capsys):
    """DMD2 with LoRA on pictures: the run, its folder and LoRA files, and `distill sample`."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        save_image(torch.rand(3, 16, 16), photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"noise {i}")
    teacher = {"source": folders(name), **families.OPTIONS.get(name, {})}
    tree = {
        "teacher": teacher, "student": {"steps": 2}, "adapters": {"rank": 4},
        "objective": {"name": "dmd2", "student_every": 2}, "data": {"source": str(photos)},
        "train": {"steps": 2, "batch": 2, "sample_every": 2}, "eval": {"teacher_steps": 2},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    out = tmp_path / "run"
    code, _, said = called(capsys, "run", str(tmp_path / "r.yaml"), "--out", str(out))
    assert code == 0 and "failed" not in said, said
    assert (out / "lora/pytorch_lora_weights.safetensors").is_file()
    student, _ = load_student(out / "student")
    assert 2 in student.counts
    words = ("sample", str(out), "--out", str(tmp_path / "g.png"), "--n", "2", "--prompt", "noise")
    code, _, said = called(capsys, *words)
    assert code == 2 and "--image" in said
    given = ("--image", "--mask") if name.startswith("inpaint") else ("--image",)
    words += tuple(word for option in given for word in (option, str(photos / "1.png")))
    code, _, said = called(capsys, *words)
    assert code == 0 and (tmp_path / "g.png").is_file(), said
