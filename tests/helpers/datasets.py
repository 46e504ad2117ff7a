"""A small text-to-image teacher, and folders of pictures to learn from, good and bad."""

import io
import tarfile

import numpy as np
import torch
from PIL import Image
from torch import nn

from distill.config.recipe import Recipe
from teachers.denoiser import Denoiser
from teachers.process import Karras
from teachers.teacher import Codec, Pixels, Teacher


class Words(nn.Module):
    """A text encoder: each letter an embedding, six of them, mixed by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.mix = nn.Embedding(128, 8), nn.Linear(8, 8)

    def forward(self, prompts):
        codes = [[ord(c) % 128 for c in p.ljust(6)[:6]] for p in prompts]
        return self.mix(self.letters(torch.tensor(codes))).tanh()


class Toy(Codec):
    """A text-to-image codec: letters in, and a convolution that halves each side."""

    def __init__(self, negative: str = "") -> None:
        torch.manual_seed(3)
        self.words, self.negative, self._null = Words(), negative, None
        self.down, self.up = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 3, 2, 2)

    @property
    def null(self):
        if self._null is None:
            self._null = self.condition([self.negative])
        return self._null

    @torch.no_grad()
    def condition(self, prompts):
        text = self.words([str(p) for p in prompts])
        return {"text": text, "pooled": text.mean(1)}

    @torch.no_grad()
    def encode(self, images):
        return self.down(images)

    @torch.no_grad()
    def decode(self, latents):
        return self.up(latents)


class Nothing(Denoiser):
    """Stands for a network: no weights that a codec's fingerprint may see."""

    def __init__(self) -> None:
        super().__init__()
        self.process, self.layer = Karras(), nn.Linear(2, 2)


def toy(negative=""):
    return Teacher(Nothing(), Toy(negative), (4, 4, 4), "toy")  # pictures of 3×8×8


def pixels(classes=0):
    return Teacher(Nothing(), Pixels(classes), (3, 8, 8), "pixels")


def recipe(objective="consistency", **data):
    tree = {
        "teacher": "digits",
        "objective": {"name": objective},
        "data": {"cache": "/nowhere/at/all", **data},
        "train": {"steps": 10, "batch": 8},
    }
    return Recipe.check(tree)


def picture(i, size=(9, 11)):
    """An image whose pixels say which it is."""
    rng = np.random.default_rng(i)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def folder_of(path, n=20, captioned=True, size=(9, 11)):
    path.mkdir(parents=True)
    for i in range(n):
        picture(i, size).save(path / f"{i:03d}.png")
        if captioned:
            (path / f"{i:03d}.txt").write_text(f"word {i}\n")
    return path


def png(i):
    file = io.BytesIO()
    picture(i).save(file, "png")
    return file.getvalue()


def tar_of(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def same(a, b):
    """Whether two sources give the same bits, in batches of two shards."""
    assert a.size == b.size
    for draw in range(2 * a.size):
        one, two = a.batch(draw, draw % 2, 2, 3), b.batch(draw, draw % 2, 2, 3)
        assert torch.equal(one.noise, two.noise)
        assert (one.x is None) == (two.x is None)
        assert one.x is None or torch.equal(one.x, two.x)
        assert one.cond.keys() == two.cond.keys()
        assert all(torch.equal(v, two.cond[k]) for k, v in one.cond.items())


def spoil(path, how):
    """Do one kind of harm to a good place of 200 samples; the name that is to be reported."""
    if how == "corrupt image":
        victim = path / "007.png"
        victim.write_bytes(victim.read_bytes()[:60])
    elif how == "empty caption":
        victim = path / "007.png"
        victim.with_suffix(".txt").write_text(" \n")
    else:
        victim = path
        with tarfile.open(victim) as tar:
            image = next(m for m in tar.getmembers() if m.name == "199.png")
        victim.write_bytes(victim.read_bytes()[: image.offset_data + 100])
    return str(victim)
