"""Finished runs, and a Hub that answers to them."""

import json
import random
import time

import pytest
from huggingface_hub import constants, file_download, utils

from tests.helpers.hub import TOKEN, serving

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def make_run(folder, weights=b"", teacher="digits"):
    """The files of a finished run, as `distill run` leaves them."""
    recipe = {
        "teacher": {"source": teacher, "guidance": 2.0},
        "objective": {"name": "dmd2"},
        "data": {"source": "digits"},
        "train": {"steps": 4, "batch": 8, "seed": 0},
    }
    sidecar = {"steps": [1, 2], "times": [1.0, 0.5], "renoise": True, "teacher": teacher}
    unet = {"num_class_embeds": 11, "_name_or_path": "/home/somebody/secret-project/unet"}
    files = {
        "recipe.yaml": "teacher: digits\n",
        "summary.json": json.dumps(
            {
                "steps": 4,
                "seed": 0,
                "wall_s": 7200.0,
                "metrics": {},
                "device": "cpu",
                "processes": 1,
            }
        ),
        "samples/step-000004-at-2.png": "a picture",
        "student/model_index.json": json.dumps({"_class_name": "ConsistencyModelPipeline"}),
        "student/fewstep.json": json.dumps({**sidecar, "recipe": recipe}),
        "student/unet/config.json": json.dumps(unet),
        "student/.hidden": "not to be sent",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "student" / WEIGHTS).write_bytes(weights or random.Random(0).randbytes(200_000))
    return folder


@pytest.fixture
def pauses(monkeypatch):
    """Pauses take no time; what they would have been."""
    seen = []
    monkeypatch.setattr(time, "sleep", seen.append)
    return seen


@pytest.fixture
def hub(monkeypatch, tmp_path, pauses):
    with serving() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        for module in (constants, file_download):  # versions before 1 keep it in both
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        new_sessions()
        yield server
    new_sessions()


def new_sessions():
    """Have huggingface_hub ask again whether it is offline; before 1, only new sessions do."""
    if reset := getattr(utils, "reset_sessions", None):
        reset()
