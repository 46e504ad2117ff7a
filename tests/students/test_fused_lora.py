"""LoRA files of a student whose teacher has LoRA files in its weights."""

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from students import schedulers
from students.export.folder import ExportError, export
from students.export.lora_files import COMFYUI, DIFFUSERS, TURBO, export_lora, rehearse
from students.lora import Adapter
from students.metadata import comfyui
from teachers import load
from tests.helpers import families, lora_formats
from tests.helpers.disturbed import disturbed


def user_file(folder, tmp_path, name):
    """A LoRA file for the network and, of Stable Diffusion, its text encoder."""
    plain = load(str(folder), **families.OPTIONS.get(name, {}))
    network: Any = plain.denoiser.backbone
    part: Any = plain.denoiser.PART
    layers = lora_formats.layers_of(network, r".*attn\d?\.(to_q|to_v)")
    state = lora_formats.peft(lora_formats.factors(network, layers), part)
    if part == "unet":
        encoder = plain.codec.pipe.text_encoder
        layers = lora_formats.layers_of(encoder, r".*(q_proj|out_proj|fc1)")
        pairs = lora_formats.factors(encoder, layers, rank=3)
        state |= lora_formats.peft(lora_formats.with_text_model(pairs), "text_encoder")
    return lora_formats.save(state, tmp_path / "style.safetensors")


@pytest.mark.parametrize(
    "name", ["sd", pytest.param("sdxl", marks=pytest.mark.slow),
             pytest.param("flux-schnell", marks=pytest.mark.slow)],
)  # fmt: skip
def test_both_files_draw_in_stock_diffusers(name, tmp_path):
    """On the plain base, one is the student, and the other its adapter alone."""
    folder = families.build(name, tmp_path / "teacher")
    file = user_file(folder, tmp_path, name)
    adapters = [{"file": str(file), "strength": 0.5}]
    teacher = load(str(folder), **families.OPTIONS.get(name, {}), adapters=adapters)
    student = disturbed(
        schedulers.student(teacher, 2, None, True, Adapter(rank=4, alpha=8.0))
    ).eval()
    assert rehearse(student, teacher) == {}
    export(student, teacher, tmp_path / "student", {})
    export_lora(student, teacher, tmp_path / "student", tmp_path / "lora")
    names = {p.name for p in (tmp_path / "lora").glob("*.safetensors")}
    assert names == {DIFFUSERS, COMFYUI, *TURBO.values()}

    both = load_file(tmp_path / "lora" / DIFFUSERS)
    alone = load_file(tmp_path / "lora" / TURBO[DIFFUSERS])
    part: Any = teacher.denoiser.PART
    ranks = {len(v) for k, v in both.items() if k.startswith(part) and ".lora_A." in k}
    assert ranks == {6} and {len(v) for k, v in alone.items() if ".lora_A." in k} == {4}
    assert any(k.startswith("text_encoder.") for k in both) == (part == "unet")
    assert not any(k.startswith("text_encoder.") for k in alone)
    for file, contents in ((DIFFUSERS, ["style.safetensors"]), (TURBO[DIFFUSERS], [])):
        with safe_open(tmp_path / "lora" / file, "pt") as opened:
            told = json.loads(opened.metadata()["turbo.contains"])
            graph = json.loads(opened.metadata()["prompt"])
        assert [t["file"] for t in told] == contents
        assert not comfyui.faults(graph)
        (node,) = (n for n in graph.values() if n["class_type"].startswith("LoraLoader"))
        # a text encoder's part is drawn with only by the loader of both
        encoders = file == DIFFUSERS and part == "unet"
        assert node["class_type"] == ("LoraLoader" if encoders else "LoraLoaderModelOnly")
        assert node["inputs"]["lora_name"] == (COMFYUI if file == DIFFUSERS else TURBO[COMFYUI])


@pytest.mark.slow
def test_a_joined_file_without_the_users_lora_is_not_written(tmp_path, monkeypatch):
    """The check in the other process sees that the user's part is missing."""
    folder = families.build("sd", tmp_path / "teacher")
    adapters = [{"file": str(user_file(folder, tmp_path, "sd")), "strength": 1.0}]
    teacher = load(str(folder), adapters=adapters)
    student = disturbed(schedulers.student(teacher, 1, None, True, Adapter(rank=4))).eval()
    export(student, teacher, tmp_path / "student", {})
    fusion = teacher.fusion
    monkeypatch.setattr(type(fusion), "changes", lambda self, part: {})
    monkeypatch.setattr(type(fusion), "parts", lambda self: set())
    with pytest.raises(ExportError, match="differs from the student"):
        export_lora(student, teacher, tmp_path / "student", tmp_path / "lora")
    assert not (tmp_path / "lora" / DIFFUSERS).exists()


def test_a_quantised_teachers_student_is_merged_into_weights_with_the_users_lora(tmp_path):
    """What is exported has the user's change in full, whatever precision was trained on."""
    folder = families.build("flux-schnell", tmp_path / "teacher")
    options = families.OPTIONS["flux-schnell"]
    file = user_file(folder, tmp_path, "flux-schnell")
    adapters = [{"file": str(file), "strength": 2.0}]
    whole = load(str(folder), **options, adapters=adapters)
    teacher = load(str(folder), **options, adapters=adapters, precision="nf4")
    student = schedulers.student(teacher, 1, None, True, Adapter(rank=2)).eval()
    from students.export.unquantised import unquantised

    network: Any = unquantised(student, teacher).denoiser
    exact: Any = whole.denoiser
    made = network.backbone.state_dict()
    for name, weight in exact.backbone.state_dict().items():
        assert torch.equal(made[name], weight.to(made[name].dtype)), name
