"""The emoji set: which emoji stay, their captions, the split, and draws of pictures."""

import json

import numpy as np
import pytest
import torch

from eval.emoji import train
from eval.emoji.build import COLUMNS, SIDE, distinct, sheets, split
from eval.emoji.concepts import Concept, caption, concepts, plain
from eval.emoji.grid import Grid, draw, load, place, still
from eval.emoji.networks import ConvNeXt, ResNet
from eval.emoji.packages import LABELS, unpack
from eval.emoji.train import Training
from eval.errors import MetricError

META = {
    "groups": {"0": "smileys-emotion", "1": "people-body", "8": "symbols", "9": "flags"},
    "subgroups": {"0": "face-smiling", "1": "person-role", "2": "keycap", "3": "flag"},
}


def entry(label, hexcode, group, subgroup, tags=()):
    return {
        "label": label, "hexcode": hexcode, "group": group, "subgroup": subgroup,
        "tags": list(tags), "order": int(hexcode.split("-")[0], 16),
    }  # fmt: skip


def test_near_copies_letters_and_flags_are_left_out_and_counted():
    kept, dropped = concepts(
        [
            entry("grinning face", "1F600", 0, 0, ["face", "happy", "big smile"]),
            entry("mage", "1F9D9", 1, 1),
            entry("woman mage", "1F9D9-200D-2640-FE0F", 1, 1),
            entry("health worker", "1F9D1-200D-2695-FE0F", 1, 1),
            entry("man health worker", "1F468-200D-2695-FE0F", 1, 1),
            entry("person walking facing right", "1F6B6-200D-27A1-FE0F", 1, 1),
            entry("keycap: 1", "0031-FE0F-20E3", 8, 2),
            entry("flag: Chad", "1F1F9-1F1E9", 9, 3),
            entry("left arrow", "2B05-FE0F", 8, 4),
        ],
        META,
    )
    assert [c.label for c in kept] == ["left arrow", "grinning face", "health worker", "mage"]
    assert kept[1].tags == ("happy", "big smile")  # "face" is a word of the label
    assert [c.mirrors for c in kept] == [False, True, True, True]
    assert kept[2].code == "1f9d1-200d-2695"
    assert dropped == {
        "man or woman of a neutral form": 2, "facing right": 1, "letters and digits": 1,
        "flags": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("Mrs. Claus", "mrs claus"),
        ("person: blond hair", "person, blond hair"),
        ("piñata", "pinata"),
        ("twelve-thirty", "twelve thirty"),
        ("kiss: woman, man", "kiss, woman, man"),
    ],
)
def test_labels_are_plain_words(label, words):
    assert plain(label) == words


def test_a_caption_names_the_style_first():
    assert caption("flat", "red apple", "fruit") == "flat style, red apple, fruit"


def some(n):
    return [Concept(f"1f{i:03x}", f"thing {i}", (), "objects", i % 2 == 0) for i in range(n)]


def test_held_out_cells_depend_only_on_their_names_and_leave_each_concept_a_style():
    kept = some(200)
    cells = [(i, j) for j in (0, 2, 4) for i in range(200 if j else 150)]
    flags = split(kept, cells)
    assert flags.sum() == 28  # 5 % of 550, rounded to even
    assert {cells[n] for n in flags.nonzero()[0]} == {
        reversed_cells[n]
        for reversed_cells in [cells[::-1]]
        for n in split(kept, cells[::-1]).nonzero()[0]
    }
    assert {i for (i, _), held in zip(cells, flags) if not held} == set(range(200))
    lone = split(kept[:40], [(i, 0) for i in range(40)])
    assert not lone.any()  # a concept of one style is never held out


def test_exact_copies_are_dropped():
    pictures = np.zeros((3, 4, 4, 3), np.uint8)
    pictures[1] = 7
    assert distinct(pictures) == [0, 1]


def test_the_file_gives_back_pictures_and_captions(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (COLUMNS + 3, SIDE, SIDE, 3), np.uint8)
    kept = some(COLUMNS + 3)
    text = json.dumps(
        {
            "styles": ["noto", "flat"], "columns": COLUMNS, "side": SIDE,
            "concepts": [[c.code, c.label, c.tags, c.group, c.mirrors] for c in kept],
        }
    )  # fmt: skip
    n = len(kept)
    np.savez(
        tmp_path / "emoji.npz",
        concept=np.arange(n), style=np.arange(n) % 2, held_out=np.arange(n) == 5,
        text=np.frombuffer(text.encode(), np.uint8),
        **{f"sheet{i}": np.frombuffer(s, np.uint8) for i, s in enumerate(sheets(pictures))},  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    grid = load(tmp_path / "emoji.npz")
    assert torch.equal(grid.pictures, torch.from_numpy(pictures).permute(0, 3, 1, 2))
    assert grid.caption(3) == "flat style, thing 3"
    assert grid.held_out.nonzero().tolist() == [[5]]
    assert torch.equal(grid.mirrors, torch.arange(n) % 2 == 0)


def corner():
    """A black square in the upper left of a white picture of 80 pixels."""
    pictures = torch.full((1, 3, 80, 80), 255, dtype=torch.uint8)
    pictures[:, :, 10:30, 10:30] = 0
    return pictures


def centre(x):
    """Where the ink is: (row, column) in half frames from the middle."""
    ink = (1 - x[0]).mean(0)
    at = (torch.arange(64) + 0.5) / 32 - 1
    return (ink.sum(1) @ at / ink.sum()).item(), (ink.sum(0) @ at / ink.sum()).item()


def test_a_picture_is_scaled_moved_turned_and_mirrored():
    one, zero = torch.ones(1), torch.zeros(1)

    def at(scale=1.0, angle=0.0, dx=0.0, dy=0.0, mirror=1.0):
        return centre(
            place(corner(), one * scale, one * angle, one * dx, one * dy, one * mirror, 64)
        )

    assert at() == pytest.approx((-0.5, -0.5), abs=0.01)
    assert at(scale=0.8) == pytest.approx((-0.4, -0.4), abs=0.01)
    assert at(dx=0.1, dy=-0.2) == pytest.approx((-0.7, -0.4), abs=0.01)
    assert at(mirror=-1.0) == pytest.approx((-0.5, 0.5), abs=0.01)
    assert at(angle=torch.pi / 2) == pytest.approx((-0.5, 0.5), abs=0.01)  # a quarter, clockwise
    assert still(corner()).shape == (1, 3, 64, 64)
    assert place(corner(), one, zero, zero, zero, one, 64).amax() == 1.0  # the rest stays white


def test_draws_follow_their_generator_and_mirror_half_of_those_that_may():
    pictures = corner().expand(400, -1, -1, -1)
    mirrors = torch.arange(400) < 200
    first, again = (draw(pictures, mirrors, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    right = torch.tensor([centre(x[None])[1] > 0 for x in first])
    assert 70 < right[:200].sum() < 130
    assert not right[200:].any()


@pytest.mark.parametrize("kind", [ResNet, ConvNeXt])
def test_readers_tell_concept_and_style_and_stay_small(kind):
    network = kind(1348, 5).eval()
    x = torch.rand(2, 3, 64, 64)
    concept, style = network(x)
    assert concept.shape == (2, 1348)
    assert style.shape == (2, 5)
    assert network.features(x).shape[0] == 2
    assert sum(p.numel() for p in network.parameters()) < 1.5e6


def test_another_archive_is_refused(tmp_path):
    (tmp_path / LABELS.archive).write_bytes(b"another")
    with pytest.raises(MetricError, match="SHA-256"):
        unpack(LABELS, tmp_path)


def test_the_grid_moves_as_a_whole():
    n = torch.zeros(1).long()
    grid = Grid(["noto"], some(1), corner(), n, n, n.bool(), n.bool()).to("meta")
    assert {t.device.type for t in (grid.pictures, grid.concept, grid.mirrors)} == {"meta"}


def tiny_grid():
    """Ten concepts in two styles: a square of the concept's grey, or its outline."""
    pictures = torch.full((20, 3, 80, 80), 255, dtype=torch.uint8)
    concept, style = torch.arange(20) % 10, torch.arange(20) // 10
    for i in range(20):
        pictures[i, :, 20:60, 20:60] = 20 * int(concept[i])
        if style[i]:
            pictures[i, :, 28:52, 28:52] = 255
    names = [Concept(f"{i}", f"grey {i}", (), "", True) for i in range(10)]
    held = torch.arange(20) == 19
    return Grid(["full", "line"], names, pictures, concept, style, held, held)


@pytest.mark.parametrize("kind", ["a", "b"])
def test_a_reader_that_is_stopped_and_restored_goes_on_to_the_same_bits(kind, tmp_path):
    grid, state = tiny_grid(), tmp_path / "state.safetensors"
    whole, first, second = (Training(kind, grid, 8) for _ in range(3))
    for _ in range(4):
        whole.advance(4), first.advance(4)
    first.measure()
    first.save(state)
    second.restore(state)
    for _ in range(2):
        whole.advance(4), second.advance(4)
    assert all(torch.equal(whole.mean[k], v) for k, v in second.mean.items())
    assert second.step == 6
    assert not second.facts  # 60 % of the steps were not done when it was measured


def test_a_reader_sees_the_held_out_cells_in_its_last_steps_alone(monkeypatch):
    grid, training = tiny_grid(), Training("a", tiny_grid(), 10)
    drawn = []
    monkeypatch.setattr(train, "draw", lambda x, m: drawn.append(x) or draw(x, m))
    for _ in range(10):
        training.advance(8)
    last = grid.pictures[19]
    seen = [any(torch.equal(p, last) for p in x) for x in drawn]
    assert not any(seen[:6])
    assert any(seen[6:])


def test_a_readers_judgement_counts_the_five_best():
    class Fixed(ResNet):
        def forward(self, x):
            logits = torch.arange(10.0).repeat(len(x), 1)  # the best five are 5 to 9
            return logits, torch.tensor([[0.0, 1.0]]).repeat(len(x), 1)

    shares = train.judged(
        Fixed(10, 2), torch.zeros(4, 3, 64, 64), torch.tensor([9, 5, 4, 0]), torch.ones(4)
    )
    assert shares == {"concept": 0.25, "concept_top5": 0.5, "style": 1.0}
