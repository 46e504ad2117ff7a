"""A tiny Stable Diffusion in the real format, its one-step student, and captioned pictures."""

import pytest
import torch
from torchvision.utils import save_image

from distill.config.recipe import Recipe
from distill.evaluation.finish import finish
from distill.training.build import build
from students.export import folder as folders
from students.export import lora_files
from teachers.storage.files import save_tensors
from tests.helpers import families

PLACES = ("on a hill", "in the rain", "at a lake", "by a wall", "in a box")


def unchecked(patch):
    """Exports without the other process that draws from them, which takes half a minute."""
    patch.setattr(folders, "verify", lambda *_: None)

    def write(files, *_):
        for file in files:
            save_tensors(file.state, file.path, file.metadata)

    patch.setattr(lora_files, "write", write)


def tree_of(teacher, **changes):
    return {
        "teacher": {"source": str(teacher), "guidance": 2},
        "student": {"steps": 1},
        "objective": {"name": "dmd2", "student_every": 2},
        "adapters": {"rank": 2, "alpha": 4},
        "players": {"student": {"lr": 0.1}, "fake": {"lr": 2e-3}},
        "data": {"prompts": str(teacher.parent / "neutral.txt")},
        "train": {"steps": 2, "batch": 2, "sample_every": 0, "ema": 0},
        "eval": {"teacher_steps": 2, "teacher_solver": "ddim"},
        **changes,
    }


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning") / "teacher"
    torch.manual_seed(0)
    families.build("sd", folder)
    prompts = [f"a {thing} {place}" for thing in ("dog", "cat") for place in PLACES]
    (folder.parent / "neutral.txt").write_text("\n".join(prompts) + "\n")
    return folder


def trained(tree, out):
    with pytest.MonkeyPatch.context() as patch:
        unchecked(patch)
        run = build(Recipe.check(tree), out)
        run.engine.train()
        assert finish(run)["failed"] == {}
    return out


@pytest.fixture(scope="session")
def student(teacher):
    """A finished run of one step, with a LoRA."""
    return trained(tree_of(teacher), teacher.parent / "student-run")


@pytest.fixture(scope="session")
def pictures(teacher):
    """Twenty red pictures of a thing that the teacher has no word for."""
    folder = teacher.parent / "pictures"
    folder.mkdir()
    for i in range(20):
        image = torch.zeros(3, 20, 16)
        image[0] = 0.5 + i / 40
        save_image(image, folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a wug {PLACES[i % 5]}, {i // 5}")
    return folder
