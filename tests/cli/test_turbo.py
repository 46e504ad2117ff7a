"""What docs/sharing.md says of a user's model and LoRA, word for word, on a small pipeline."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import families
from tests.helpers import lora_formats as formats
from tests.helpers.command_line import called

PAGE = Path(__file__).parent.parent.parent / "docs/sharing.md"
SECTION = (
    PAGE.read_text(encoding="utf-8").split("## Your model with your LoRA")[1].split("\n### ")[0]
)
BLOCKS = dict(re.findall(r"^```(yaml|bash|python)\n(.*?)^```$", SECTION, re.M | re.S))
MODEL = "stabilityai/stable-diffusion-xl-base-1.0"
SMALL = ("adapters.rank=2", "train.steps=2", "train.batch=2", "train.accumulate=1",
         "train.sample_every=0", "train.guards.every=1", "train.guards.prompts=2",
         "eval.teacher_steps=2")  # fmt: skip
CAPTIONS = [f"ink, a {thing} {place}" for thing in ("fox", "dog", "cat", "cow", "hen", "ox")
            for place in ("on a hill", "in the rain", "at a lake", "by a wall")]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the reader stands: a model, a style and 24 captions with two pictures beside them."""
    from PIL import Image

    from teachers import load

    families.build("sd", tmp_path / "model")
    network = load(str(tmp_path / "model")).codec.pipe.unet
    pairs = formats.factors(network, formats.layers_of(network, r".*attn\d\.to_v"))
    formats.save(formats.kohya(pairs, "lora_unet", 2.0), tmp_path / "style.safetensors")
    (tmp_path / "captions").mkdir()
    for i, caption in enumerate(CAPTIONS):
        (tmp_path / "captions" / f"{i}.txt").write_text(caption)
    for i in range(2):
        Image.new("RGB", (40, 48), (90 * i, 120, 30)).save(tmp_path / "captions" / f"{i}.png")
    (tmp_path / "fast.yaml").write_text(BLOCKS["yaml"].replace(MODEL, "model"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_model_with_a_lora_becomes_fast_as_the_page_says(folder, capsys):
    """The recipe, the command and the lines of Python; the joined file draws the student."""
    program, *words = BLOCKS["bash"].split()
    assert program == "distill"
    code, out, err = called(capsys, *words, *SMALL)
    assert code == 0, err
    assert "style.safetensors: 8 of 8 pairs, strength 0.8" in err
    assert "data.captions: 24 captions, trigger 'ink'" in err
    assert re.search(r"guards: diversity \S+  matching \S+  nearest \S+", out + err)
    names = {}
    exec(compile(BLOCKS["python"].replace(MODEL, "model"), str(PAGE), "exec"), names)
    pipe, prompt = names["pipe"], "ink, a fox on a hill"
    assert np.asarray(names["image"]).shape[2] == 3

    def drawn(model):
        torch.manual_seed(1)
        rng = torch.Generator().manual_seed(0)
        return model(prompt, num_inference_steps=4, guidance_scale=1.0, generator=rng,
                     output_type="pt").images  # fmt: skip

    student = type(pipe).from_pretrained("runs/fast/student")
    torch.testing.assert_close(drawn(pipe), drawn(student), atol=1e-3, rtol=0)
