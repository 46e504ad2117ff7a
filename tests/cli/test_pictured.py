"""Commands on students that take a picture with each prompt: refusals, options."""

from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file
from torchvision.utils import save_image

from students import schedulers
from students.export import folder as exporting
from teachers import load
from tests.helpers.command_line import called
from tests.helpers.refusals import refused_line


@pytest.fixture(scope="module")
def root(folders, tmp_path_factory):
    """A student that inpaints, a picture, and a file that is named as a LoRA."""
    root = tmp_path_factory.mktemp("pictured")
    teacher = load(folders("inpaint"))
    recipe = {
        "teacher": {"source": folders("inpaint")}, "objective": {"name": "dmd2"},
        "data": {"source": str(root)}, "train": {"steps": 1},
    }  # fmt: skip
    with patch.object(exporting, "verify", lambda *_: None):
        exporting.export(schedulers.student(teacher, 1), teacher, root / "student", recipe)
    save_image(torch.zeros(3, 16, 16), root / "photo.png")
    save_file({}, root / "style.safetensors")
    return root


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("auto", "{teacher}", "--gpu", "rtx-4090"), "MODEL"),
        (("tune", "{root}/student", "--data", "{root}"), "STUDENT"),
        (("compat", "{root}/student", "{root}/style.safetensors"), "student *"),
    ],
    ids=["auto", "tune", "compat"],
)
def test_auto_tune_and_compat_refuse_it(root, folders, tmp_path, capsys, words, key):
    words = [w.format(root=root, teacher=folders("inpaint")) for w in words]
    code, text, err = called(capsys, *words, "--out", tmp_path / "out")
    assert (code, text) == (2, "")
    refused_line(err, key, "takes a picture with each")
    assert not (tmp_path / "out").exists()


def test_a_sample_needs_a_picture_and_its_mask(root, tmp_path, capsys):
    words = ["sample", root / "student", "--prompt", "a cat", "--out", tmp_path / "g.png"]
    for missing in ("--image", "--mask"):
        code, _, err = called(capsys, *words)
        assert code == 2
        refused_line(err, missing, "missing")
        words += [missing, root / "photo.png"]
    code, _, err = called(capsys, *words, "--n", 1)
    assert (code, err) == (0, "") and (tmp_path / "g.png").is_file()
