"""A tiny Stable Diffusion in the real format, its one-step student, and captioned pictures."""

import pytest
import torch
from torchvision.utils import save_image

from distill.config.recipe import Recipe
from distill.training.run_folder import write_recipe
from students.export import folder as folders
from students.export import lora_files
from students.export.forms import form_of
from students.lora import Adapter
from teachers import load
from teachers.storage.files import save_tensors
from tests.helpers import families
from tests.helpers.disturbed import disturbed

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
        "players": {"student": {"lr": 1e-2}, "fake": {"lr": 2e-3}},
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


@pytest.fixture(scope="session")
def student(teacher):
    """The folder of a finished run of one step, with a LoRA; it was not trained, but changed."""
    out, recipe = teacher.parent / "student-run", Recipe.check(tree_of(teacher))
    loaded = load(str(teacher))
    adapter = Adapter(rank=2, alpha=4)
    made = disturbed(form_of(loaded).student(1, None, True, adapter))
    with pytest.MonkeyPatch.context() as patch:
        unchecked(patch)
        folders.export(made, loaded, out / "student", recipe.tree())
        lora_files.export_lora(made, loaded, out / "student", out / "lora")
    write_recipe(recipe, out)
    return out


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
