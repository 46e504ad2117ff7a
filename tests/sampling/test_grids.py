"""Grids of pictures and of videos, and prompts that are cut."""

import torch
from PIL import Image

from distill.data.encode import EncodingJob, encode_in_memory
from distill.data.listing import Item, Listing
from distill.grids import save_grid
from teachers import load


def test_a_video_is_a_row_of_frames_evenly_apart(tmp_path):
    grey = torch.linspace(-1, 1, 17).view(1, 1, 17, 1, 1)
    videos = grey.expand(2, 3, 17, 40, 40).clone()
    videos[1] *= -1
    save_grid(videos, tmp_path / "grid.png", columns=3)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (8 * 41 + 1, 2 * 41 + 1)
        rows = [[image.getpixel((21 + 41 * i, y))[0] for i in range(8)] for y in (21, 62)]
    frames = [0, 2, 5, 7, 9, 11, 14, 16]
    assert rows[0] == [round(255 * f / 16) for f in frames]
    assert all(abs(a + b - 255) <= 1 for a, b in zip(*rows, strict=True))


def test_prompts_that_are_cut_are_counted_in_one_line_with_the_first_of_them(capfd):
    teacher = load("shapes")
    assert teacher.codec.pipe.tokenizer.model_max_length == 16
    prompts = ["one red circle on the left", "word " * 40, "two blue squares at the top"]
    listing = Listing("data.prompts: 'p.txt'", [Item(p, p) for p in prompts])
    encode_in_memory(EncodingJob(teacher, listing, [(0, 0)], with_data=False), 0, 0.0)
    out, err = capfd.readouterr()
    assert out == ""
    said = (
        "distill: data.prompts: 'p.txt': 1 of 3 prompts is longer than the encoder's 16 tokens and "
        "was cut (first: 'word word "
    )
    assert err.startswith(said) and err.endswith("word')\n")
    assert "…" in err and len(err) < len(said) + 90
