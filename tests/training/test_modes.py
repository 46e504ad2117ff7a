"""Whatever is written can be read by whoever may read a new file of the user's."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from distill.data import cache
from distill.training import checkpoint
from eval.protocols.collect import Measurement
from eval.protocols.reference import Moments, Reference
from students import schedulers
from students.export import folder as exporting
from students.export import formats, lora_files
from students.export.forms import form_of
from students.lora import Adapter
from teachers import load
from teachers.edm import checkpoints
from teachers.prompt_limits import Cuts
from teachers.storage.files import open_to_readers, save_tensors
from tests.helpers import families


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_open(folder, umask):
    """Every file and folder has the permissions that the umask leaves of the usual ones."""
    paths = [folder, *folder.rglob("*")]
    assert any(p.is_file() for p in paths)
    for path in paths:
        usual = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == usual & ~umask, path


def test_weights_are_not_their_owners_alone(tmp_path, umask):
    out = tmp_path / "out"
    out.mkdir()
    save_file({"x": torch.zeros(2)}, out / "a.safetensors")
    open_to_readers(out)
    save_tensors({"x": torch.zeros(2)}, out / "b.safetensors", {"of": "b"})
    assert {p.name for p in out.iterdir()} == {"a.safetensors", "b.safetensors"}
    assert_open(out, umask)


def test_checkpoints_caches_and_references_are_open(tmp_path, umask):
    out = tmp_path / "out"
    out.mkdir()
    checkpoint.save({"x": torch.zeros(2)}, out / "checkpoint", {"step": 1})
    notes = cache.ShardNotes([], [], Cuts())
    cache._write(out / "shard.safetensors", {"x": torch.zeros(2)}, notes)
    moments = Moments(torch.zeros(2).double(), torch.eye(2).double(), 3)
    Reference("name", "rule", "content", moments, torch.zeros(3, 2)).save(out / "r.safetensors")
    Measurement(()).save(out / "g.safetensors", "about")
    form = form_of(load("analytic:gaussian"))
    form.export(form.student(1, None, True, None), out / "linear", {})
    assert_open(out, umask)


def test_students_and_their_files_are_open(monkeypatch, tmp_path, umask):
    monkeypatch.setattr(exporting, "verify", lambda *_: None)
    monkeypatch.setattr(formats, "compare", lambda *_: 0.0)
    counts = {f"{i} 1": torch.zeros(1) for i in range(2)}
    monkeypatch.setattr(formats, "drawn_elsewhere", lambda *_: counts)
    teacher = load(str(families.build("sd", tmp_path / "teacher")))
    student = schedulers.student(teacher, 1, None, True, Adapter(rank=2)).eval()
    out = tmp_path / "out"
    exporting.export(student, teacher, out / "student", {})
    lora_files.export_lora(student, teacher, out / "student", out / "lora")
    assert_open(out, umask)


def test_converted_networks_are_open(monkeypatch, tmp_path, umask):
    files = checkpoints.Files({"kind": "x"}, {"w": torch.zeros(2)})
    monkeypatch.setattr(checkpoints, "unpickle", lambda source: files)
    monkeypatch.setattr(checkpoints, "denoiser_of", lambda files, source: None)
    checkpoints.convert(tmp_path / "a.pkl", tmp_path / "out")
    assert_open(tmp_path / "out", umask)
