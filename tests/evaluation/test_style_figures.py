"""Figures of LoRA files: shifts of features, colours, overlap of adapters, and their summary."""

import math

import pytest
import torch

from distill.evaluation import style_figures as figures
from eval import shapes
from eval.errors import MetricError
from eval.protocols import spec
from eval.samples import Samples
from eval.shapes.scenes import scenes_of
from teachers.adapters.files import Pair


def test_a_students_shift_of_half_the_length_and_another_direction():
    plain = torch.randn(6, 3)
    teacher = figures.shift(plain, plain + torch.tensor([2.0, 0, 0]))
    student = figures.shift(plain + 5, plain + 5 + torch.tensor([0.5, math.sqrt(0.75), 0]))
    assert figures.shift_ratio(student, teacher) == pytest.approx(0.5, abs=1e-6)
    assert figures.cosine(student, teacher) == pytest.approx(0.5, abs=1e-6)


def test_without_a_shift_there_is_no_ratio_and_no_cosine():
    none, some = torch.zeros(3).double(), torch.ones(3).double()
    assert figures.shift_ratio(some, none) is None
    assert figures.shift_ratio(none, some) == 0
    assert figures.cosine(none, some) is None


def test_halves_are_the_even_and_the_odd_pictures():
    plain, styled = torch.zeros(4, 2), torch.tensor([[1.0, 0], [0, 1.0], [1.0, 0], [0, 1.0]])
    assert figures.halves_cosine(plain, styled) == pytest.approx(0)
    assert figures.halves_cosine(plain, styled[[0, 0, 2, 2]]) == pytest.approx(1)


def test_colours_of_known_pixels():
    # red at half brightness: saturation 1; grey and black: 0; (200, 100, 150): 1/2
    pixels = [(128, 0, 0), (90, 90, 90), (0, 0, 0), (200, 100, 150)]
    images = torch.tensor(pixels, dtype=torch.uint8).T.reshape(1, 3, 2, 2)
    assert figures.saturation(images) == pytest.approx(1.5 / 4)
    assert figures.clipped_share(images) == pytest.approx(2 / 4)
    white = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    assert figures.saturation(white) == 0 and figures.clipped_share(white) == 1


def test_pooled_pixels_are_means_of_blocks():
    images = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    images[..., :2, :2] = 255
    features = figures.pooled_pixels(images)
    assert features.shape == (1, 64)
    assert features[0, 0] == 1 and features[0, 1:].sum() == 0


def pair(down, module="m"):
    down = torch.tensor(down, dtype=torch.float32)
    return Pair("unet", module, down, torch.ones(2, len(down)), 1.0)


@pytest.mark.parametrize(
    ("style", "turbo", "share"),
    [
        ([[1, 0, 0, 0], [0, 1, 0, 0]], [[3, 4, 0, 0]], 1),
        ([[1, 0, 0, 0], [0, 1, 0, 0]], [[0, 0, 1, 2]], 0),
        ([[2, 0, 0, 0], [4, 0, 0, 0]], [[3, 4, 0, 0]], 0.6),  # its rows are one direction
        ([[1, 0, 0, 0]], [[1, 0, 0, 0], [0, 1, 0, 0]], math.sqrt(0.5)),
    ],
)
def test_overlap_is_the_projected_share_of_the_students_rows(style, turbo, share):
    found = figures.overlap([pair(style)], [pair(turbo)])
    rank = len(torch.tensor(style).unique(dim=0)) if share != 0.6 else 1
    assert found["mean"] == pytest.approx(share, abs=1e-6)
    assert found["by_chance"] == pytest.approx(math.sqrt(rank / 4))
    assert found["layer"] == "m" and found["layers"] == 1


def test_the_change_counts_what_the_student_uses_of_its_rows():
    """Its first row, which the style reads, has no weight in B; its second has."""
    down, up = torch.eye(2, 4), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    turbo = Pair("unet", "m", down, up, 1.0)
    first, second = pair([[1, 0, 0, 0]]), pair([[0, 1, 0, 0]])
    assert figures.overlap([first], [turbo])["mean"] == pytest.approx(math.sqrt(0.5))
    assert figures.overlap([first], [turbo])["change"] == 0
    assert figures.overlap([second], [turbo])["change"] == pytest.approx(1)


def test_overlap_by_chance_is_what_random_rows_have():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 256, generator=rng), torch.randn(64, 256, generator=rng)
    style = Pair("unet", "m", a, torch.ones(4, 8), 1.0)
    turbo = Pair("unet", "m", b, torch.randn(64, 64, generator=rng), 1.0)
    found = figures.overlap([style], [turbo])
    assert found["mean"] == pytest.approx(found["by_chance"], rel=0.05)
    assert found["change"] == pytest.approx(found["by_chance"], rel=0.1)


def test_layers_that_only_one_of_them_changes_have_no_overlap():
    assert figures.overlap([pair([[1, 0]], "a")], [pair([[1, 0]], "b")]) == {"layers": 0}


def row(lora, strength, ratio, cosine, **student):
    teacher = {"saturation": 0.5, "clipped": 0.1, "prompt_score": 0.9}
    return {"lora": lora, "strength": strength, "shift_ratio": ratio, "shift_cosine": cosine,
            "teacher": teacher, "student": teacher | student}  # fmt: skip


def test_means_and_worst_values_name_their_lora():
    rows = [
        row("a", 0.0, None, None, saturation=0.0),  # of strength 0: not counted
        row("a", 1.0, 0.4, 0.9, saturation=0.6, prompt_score=0.95),
        row("b", 1.0, 2.0, 0.7, clipped=0.3, prompt_score=0.6),
    ]
    result = figures.summary(rows)
    assert result["mean"]["shift_ratio"] == pytest.approx(1.2)
    assert result["mean"]["prompt_score"] == pytest.approx((0.05 - 0.3) / 2)
    worst = {k: (v["lora"], round(v["value"], 6)) for k, v in result["worst"].items()}
    assert worst == {
        "shift_ratio": ("a", 0.4),  # 1/2.5 is farther from 1 than 2
        "shift_cosine": ("b", 0.7),
        "prompt_score": ("b", -0.3),
        "saturation": ("a", 0.1),
        "clipped": ("b", 0.2),
    }


# ---- prompt scores


def test_a_word_that_the_grammar_lacks_stands_for_any():
    scenes = scenes_of("three z crosses on the left")
    assert {s.colour for s in scenes} == set(shapes.COLOURS)
    assert {s._replace(colour="") for s in scenes} == {shapes.Scene("cross", "", 3, "left")}
    assert scenes_of("one red circle on the left") == {shapes.Scene("circle", "red", 1, "left")}


@pytest.mark.parametrize("caption", ["a cat", "one red circles on the left", "z z z z"])
def test_a_caption_like_none_is_refused(caption):
    with pytest.raises(MetricError, match="is like no caption"):
        scenes_of(caption)


def test_the_shapes_score_reads_known_words_and_is_the_accuracy_of_whole_captions():
    score = spec.spec(spec.FOLDER / "shapes.yaml").prompt_score("shapes")
    assert score is not None
    captions = shapes.all_captions()[::24]
    images = shapes.draw(captions, 0)
    wrong = [captions[-1], *captions[:-1]]
    assert score(Samples(images, captions)) == {"accuracy": 1.0}
    assert score(Samples(images, wrong)) == {
        "accuracy": shapes.accuracy(images, wrong)["accuracy"]
    }  # fmt: skip
    colours = [c.split()[1] for c in captions]
    unknown = [c.replace(v, "z") for c, v in zip(captions, colours, strict=True)]
    assert score(Samples(images, unknown)) == {"accuracy": 1.0}


def test_protocols_without_a_score_of_prompts_have_none():
    assert spec.spec(spec.FOLDER / "imagenet64-50k.yaml").prompt_score("x") is None
    digits = spec.spec(spec.FOLDER / "digits.yaml").prompt_score("digits")
    assert digits is not None
    assert digits(Samples(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), ["1", "2"]))["accuracy"] < 1
