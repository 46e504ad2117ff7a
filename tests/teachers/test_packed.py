"""Folders whose weights bitsandbytes quantised: decoded as it does, trained on, and exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from students import schedulers
from students.export.folder import pipeline, rehearse
from students.export.unquantised import base_folder, unquantised, with_file_weights
from students.lora import Adapter, unwrap
from teachers import load
from teachers.quantised import Quantised
from teachers.storage.packed import decoded, say
from tests.helpers import families, packed
from tests.helpers.disturbed import disturbed
from tests.helpers.refusals import refused

GOLDEN = Path(packed.__file__).with_name("bitsandbytes_outputs.safetensors")
FORMS = {"nf4": "nf4", "fp4": "fp4", "nf4 nested": "nf4", "fp4 nested": "fp4", "8 bits": "8 bits"}
OPTIONS = families.OPTIONS["flux-dev"]
PARTS = {"transformer": "nf4", "text_encoder": "8 bits", "text_encoder_2": "fp4"}


@pytest.mark.parametrize("case", FORMS)
def test_weights_are_decoded_as_bitsandbytes_does(case):
    """Its stored tensors and its results, of version 0.50.2; with doubly quantised scales."""
    stored = {k.removeprefix(f"{case}/"): v for k, v in load_file(GOLDEN).items()
              if k.startswith(f"{case}/")}  # fmt: skip
    expected = stored.pop("first"), stored.pop("last")
    found = decoded(stored, torch.float32)
    assert found.keys() == {"weight"}
    flat = found["weight"].flatten()
    torch.testing.assert_close(flat[:640], expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(flat[-640:], expected[1], rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module", params=[False, True], ids=["", "nested"])
def folders(request, tmp_path_factory):
    """FLUX.1's folder, and a copy with three components quantised."""
    root = tmp_path_factory.mktemp("packed")
    plain = families.build("flux-dev", root / "plain")
    copy = shutil.copytree(plain, root / "packed")
    for part, form in PARTS.items():
        packed.pack(copy / part, form, request.param)
    return plain, copy


def test_every_component_is_decoded(folders, capfd):
    """CLIP, T5 and the network; a line says so of each. Rounded to four bits, and no further."""
    plain, copy = folders
    capfd.readouterr(), say.cache_clear()
    teacher = load(str(copy), **OPTIONS)
    err = capfd.readouterr().err
    assert [form in err for form in PARTS.values()] == [True] * 3 and err.count("\n") == 3
    assert err.count("nf4 keeps its codes") == 1
    exact = load(str(plain), **OPTIONS).codec.pipe
    for part, form in PARTS.items():
        network = getattr(teacher.codec.pipe, part)
        file = decoded(load_file(next((copy / part).glob("*.safetensors"))), torch.float32)
        mine, theirs = network.state_dict(), getattr(exact, part).state_dict()
        assert mine.keys() == theirs.keys()
        named = {k.removeprefix("text_model."): v for k, v in file.items()}
        gaps = []
        for k, v in mine.items():
            if (value := named.get(k.removeprefix("text_model."))) is not None:
                assert torch.equal(v, value), k
            if v.ndim == 2 and not torch.equal(v, theirs[k]):
                gaps.append(float((v - theirs[k]).norm() / theirs[k].norm()))
        assert gaps and max(gaps) < {"8 bits": 0.02, "nf4": 0.13, "fp4": 0.2}[form]
        assert not hasattr(network.config, "quantization_config")
        assert not network.training


def test_nf4_keeps_the_codes_of_nf4(folders):
    """Decoded to bf16 and encoded again, codes are equal, and scales to their rounding."""
    teacher = load(str(folders[1]), precision="nf4", **OPTIONS)
    stored = load_file(next((folders[1] / "transformer").glob("*.safetensors")))
    exact = decoded(stored, torch.float32)
    layers = {k: m for k, m in teacher.denoiser.backbone.named_modules() if type(m) is Quantised}
    assert len(layers) > 20
    for name, layer in layers.items():
        codes = stored[f"{name}.weight"].flatten()
        assert torch.equal(layer.codes[: len(codes)], codes)
        gap = (layer.weight.float() - exact[f"{name}.weight"]).norm()
        assert gap < 4e-3 * exact[f"{name}.weight"].norm()


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_its_students_are_merged_into_the_decoded_weights(folders, precision, tmp_path):
    """In a stock pipeline, without bitsandbytes; so is the base of its LoRA files."""
    teacher = load(str(folders[1]), precision=precision, **OPTIONS)
    student = disturbed(schedulers.student(teacher, 2, None, True, Adapter(rank=2))).eval()
    rehearse(student, teacher)
    made = pipeline(unquantised(student, teacher), teacher)
    made.save_pretrained(tmp_path / "student")
    for part in PARTS:
        config = json.loads((tmp_path / "student" / part / "config.json").read_text())
        assert "quantization_config" not in config
    base = base_folder(teacher, {"transformer"}, tmp_path / "base")
    assert base == tmp_path / "base"
    stored = load_file(next((base / "transformer").glob("*.safetensors")))
    exact = load(str(folders[1]), **OPTIONS).denoiser.backbone.state_dict()
    assert all(torch.equal(stored[k], v) for k, v in exact.items())
    whole = with_file_weights(student, teacher, torch.float32)
    name = "transformer_blocks.0.attn.to_q"
    layer = unwrap(student.denoiser).backbone.get_submodule(name)
    expected = exact[f"{name}.weight"] + layer.get_delta_weight("student")
    found = unwrap(whole.denoiser).backbone.get_submodule(name).weight
    torch.testing.assert_close(found, expected)


def test_damaged_and_other_quantised_folders_are_refused(folders, tmp_path):
    copy = shutil.copytree(folders[1], tmp_path / "t")
    file = next((copy / "transformer").glob("*.safetensors"))
    weights = load_file(file)
    scales = next(k for k in weights if k.endswith(".absmax"))
    save_file({k: v for k, v in weights.items() if k != scales}, file)
    with refused("teacher '*/t'", scales):
        load(str(copy), **OPTIONS)
    save_file({k: v for k, v in weights.items() if k != "x_embedder.bias"}, file)
    with refused("teacher '*/t'", "x_embedder.bias"):
        load(str(copy), **OPTIONS)
    config = json.loads((copy / "transformer" / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "torchao"
    (copy / "transformer" / "config.json").write_text(json.dumps(config))
    with refused("teacher '*/t'", "torchao", "bitsandbytes"):
        load(str(copy), **OPTIONS)
