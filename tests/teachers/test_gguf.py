"""GGUF files of FLUX.1 and SD 3 as teachers: decoded, trained on, and merged into what they decode.

The package `gguf` is optional. Without it a stand-in with two forms of its own plays its part here.
"""

import importlib.util
import sys

import pytest
import torch

from students import schedulers
from students.export.folder import pipeline, rehearse
from students.export.unquantised import base_folder, unquantised
from students.lora import Adapter
from teachers import load
from teachers.storage import original
from tests.helpers import families, gguf_files, single_files
from tests.helpers.disturbed import disturbed
from tests.helpers.gguf_files import write
from tests.helpers.refusals import refused

NAMES = ["flux-dev", "sd3"]
HERE = importlib.util.find_spec("gguf") is not None


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", gguf_files.stand_in())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("gguf")
    built = {name: families.build(name, root / name) for name in NAMES}
    return {k: (v, load(str(v), **options(k))) for k, v in built.items()}


def options(name):
    return families.OPTIONS.get(name, {})


def converted(exact):
    weights, _ = (original.flux if "img_in.weight" in exact else original.sd3)(dict(exact))
    return weights


@pytest.mark.parametrize("name", NAMES)
def test_a_network_in_gguf_is_decoded(made, name, stand_in, tmp_path):
    """With the rest from the folder; some weights are stored flat, with their shapes beside."""
    folder, theirs = made[name]
    state = single_files.network(theirs.codec.pipe)
    file, exact = write(state, tmp_path / "a.gguf", ("bytes", "bytes", "flat"))
    ours = load(file, config=str(folder), **options(name))
    weights = ours.denoiser.backbone.state_dict()
    expected = converted(exact)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[k], v) for k, v in expected.items())
    assert type(ours.codec.pipe) is type(theirs.codec.pipe)
    assert ours.denoiser.process == theirs.denoiser.process
    for one, other in zip(ours.codec.condition(["cat"]).values(),
                          theirs.codec.condition(["cat"]).values(), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_its_students_are_merged_into_the_decoded_weights(made, precision, stand_in, tmp_path):
    folder, theirs = made["flux-dev"]
    file, exact = write(single_files.network(theirs.codec.pipe), tmp_path / "a.gguf")
    teacher = load(file, config=str(folder), precision=precision, **options("flux-dev"))
    student = disturbed(schedulers.student(teacher, 2, None, True, Adapter(rank=2))).eval()
    rehearse(student, teacher)
    made_of = pipeline(unquantised(student, teacher), teacher).transformer.state_dict()
    expected, name = converted(exact), "transformer_blocks.0.attn.to_q.weight"
    weight = teacher.denoiser.backbone.get_submodule(name.removesuffix(".weight"))
    delta = weight.get_delta_weight("student").float()
    torch.testing.assert_close(made_of[name].float(), expected[name] + delta, atol=1e-2, rtol=1e-2)
    base = base_folder(teacher, {"transformer"}, tmp_path / "base")
    from diffusers import FluxTransformer2DModel

    stored = FluxTransformer2DModel.from_pretrained(base / "transformer").state_dict()
    assert all(torch.equal(stored[k], v) for k, v in expected.items())


def test_files_that_cannot_be_read_are_refused(made, stand_in, tmp_path, monkeypatch):
    folder, theirs = made["sd3"]
    state = single_files.network(theirs.codec.pipe)
    file, _ = write(state, tmp_path / "a.gguf", ("unknown",))
    with refused("teacher '*/a.gguf'", "unknown is not decoded", "Q8_0"):
        load(file, config=str(folder))
    lacking = {k: v for k, v in state.items() if k != "context_embedder.bias"}
    file, _ = write(lacking, tmp_path / "b.gguf")
    with refused("teacher '*/b.gguf'", "context_embedder.bias"):
        load(file, config=str(folder))
    (tmp_path / "c.gguf").write_bytes(b"GGUF")
    with refused("teacher '*/c.gguf'", "c.gguf"):
        load(str(tmp_path / "c.gguf"), config=str(folder))
    file, _ = write({"input_blocks.0.0.weight": torch.ones(2, 2)}, tmp_path / "d.gguf")
    with refused("teacher '*/d.gguf'", "only transformers are read", "config"):
        load(file, config=str(folder))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with refused("teacher '*/a.gguf'", "fewstep[gguf]"):
        load(str(tmp_path / "a.gguf"), config=str(folder))


@pytest.mark.skipif(not HERE, reason="the package gguf is optional")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["Q8_0", "Q4_0", "Q5_1", "BF16"])
def test_the_packages_own_files_are_decoded(made, name, form, tmp_path):
    """Written by its writer; the error is that of the form, and nothing is added to it."""
    import gguf
    import numpy

    folder, theirs = made[name]
    kind, expected = getattr(gguf.GGMLQuantizationType, form), {}
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    for k, v in single_files.network(theirs.codec.pipe).items():
        value = numpy.ascontiguousarray(v.numpy())
        if v.ndim == 2 and v.shape[1] % 32 == 0:
            value = gguf.quants.quantize(value, kind)
            writer.add_tensor(k, value, raw_dtype=kind)
            expected[k] = torch.from_numpy(gguf.quants.dequantize(value, kind))
            error = (expected[k] - v).norm() / v.norm()
            assert error < {"Q8_0": 0.01, "Q4_0": 0.15, "Q5_1": 0.06, "BF16": 0.003}[form]
        else:
            writer.add_tensor(k, value)
            expected[k] = v
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = load(str(tmp_path / "a.gguf"), config=str(folder), **options(name))
    weights = ours.denoiser.backbone.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in converted(expected).items())
