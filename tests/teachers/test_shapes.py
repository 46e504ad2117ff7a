import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from distill.__main__ import app
from distill.config.recipe import find, override, read_yaml
from distill.pretrain.text_to_image import TextRecipe, pipeline, samples, save
from distill.pretrain.tokenizer import clip_tokenizer
from eval import shapes
from eval.errors import MetricError
from eval.protocols.measure import floor, protocol
from eval.samples import Samples, to_uint8
from eval.shapes.classifier import HEADS, classifier, labels
from eval.shapes.reader import components
from eval.shapes.scenes import AREA, SINKS, SIZE, coverage
from tests.helpers.refusals import refused

TEACHER = Path(__file__).parent.parent.parent / "teachers" / "shapes"
RECIPE = "teachers/shapes"
# Parts small enough to train for a few steps in a test.
SMALL = [
    "data.each=1", "data.held_out=1", "train.log_every=1", "train.save_every=2", "eval=null",
    "vae.block_out_channels=[8,8,8]", "unet.block_out_channels=[8,8]",
    "text_encoder.hidden_size=16", "text_encoder.intermediate_size=16",
    "train.vae.steps=3", "train.vae.batch=4", "train.unet.steps=3", "train.unet.batch=4",
]  # fmt: skip


def recipe(*overrides):
    tree = override(read_yaml(find(RECIPE)), [*SMALL, *overrides])
    tree["eval"] = {}
    return tree


# The grammar


def test_the_grammar_has_every_combination_once_and_reads_its_own_sentences():
    every = shapes.all_captions()
    assert len(every) == len(set(every)) == 4 * 6 * 3 * 5
    assert "two red circles on the left" in every
    assert "one blue square at the top" in every
    assert "three white crosses in the middle" in every
    assert [shapes.parse(c).caption for c in every] == every
    assert shapes.parse("one red cross on the right") == ("cross", "red", 1, "right")


def test_a_caption_outside_the_grammar_is_named_with_the_nearest_inside_it():
    with pytest.raises(
        MetricError, match=r"'two red circle on the left' is not a caption.*circles"
    ):
        shapes.draw(["two red circle on the left"], 0)


def test_captions_are_uniform_and_follow_from_the_seed():
    drawn = shapes.captions(36_000, 3)
    assert drawn == shapes.captions(36_000, 3) != shapes.captions(36_000, 4)
    counts = np.unique(drawn, return_counts=True)[1]
    assert len(counts) == 360
    assert ((counts - 100) ** 2 / 100).sum() < 360 + 5 * (2 * 360) ** 0.5  # χ², five deviations


# Drawing


def test_drawings_follow_from_captions_and_seed():
    wanted = shapes.captions(50, 0)
    first = shapes.draw(wanted, 1)
    assert first.shape == (50, 3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, shapes.draw(wanted, 1))
    assert (first != shapes.draw(wanted, 2)).flatten(1).any(1).all()
    assert shapes.draw([], 0).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("kind", range(len(shapes.SHAPES)), ids=shapes.SHAPES)
def test_areas_and_centroids_are_those_of_plane_geometry(kind):
    rng = np.random.default_rng(kind)
    x, y, r = 16 + rng.uniform(-2, 2, 200), 16 + rng.uniform(-2, 2, 200), rng.uniform(3.4, 6, 200)
    cover = coverage(np.full(200, kind), x, y, r)
    area = cover.sum((1, 2))
    assert np.abs(area / (AREA[kind] * r**2) - 1).max() < 0.03
    grid = np.arange(SIZE) + 0.5
    assert np.abs((cover * grid).sum((1, 2)) / area - x).max() < 0.05
    below = (cover * grid[:, None]).sum((1, 2)) / area - y
    assert np.abs(below - SINKS[kind] * r).max() < 0.12


def test_no_object_touches_another():
    wanted = shapes.all_captions() * 4
    images = shapes.draw(wanted, 7)
    solid = (images.float() - torch.tensor([24.0, 24, 32])[:, None, None]).norm(dim=1) > 100
    labelled = components(solid.numpy())
    found = [len(np.unique(one[one > 0])) for one in labelled]
    assert found == [shapes.parse(c).count for c in wanted]


# The reader


def test_components_of_a_case_worked_by_hand():
    mask = np.array([[[1, 0, 1], [1, 0, 0], [0, 1, 1]], [[1, 1, 1], [0, 0, 1], [1, 1, 1]]], bool)
    found = components(mask)
    assert len(np.unique(found[0][mask[0]])) == 3  # diagonals do not join
    assert len(np.unique(found[1][mask[1]])) == 1  # and a winding one is one
    assert (found[~mask] == 0).all()
    assert {(v - 1) // 9 for v in found[0][mask[0]]} == {0}
    assert {(v - 1) // 9 for v in found[1][mask[1]]} == {1}


def test_the_reader_reads_clean_drawings():
    wanted = shapes.captions(3000, 11)
    found = shapes.accuracy(shapes.draw(wanted, 12), wanted)
    assert min(found.values()) >= 0.999


def test_the_reader_reads_through_noise_and_blur():
    from torchvision.transforms.functional import gaussian_blur

    wanted = shapes.captions(1000, 13)
    images = shapes.draw(wanted, 14).float()
    noise = 10 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for seen in (images + noise, gaussian_blur(images, [5, 5], [0.5, 0.5]) + noise):
        found = shapes.accuracy(seen.round().clamp(0, 255).to(torch.uint8), wanted)
        assert found["accuracy"] >= 0.99


def test_each_attribute_is_judged_on_its_own():
    images = shapes.draw(["two red circles on the left"] * 4, 0)
    asked = [
        "two red squares on the left",
        "two blue circles on the left",
        "one red circle on the left",
        "two red circles at the top",
    ]
    found = shapes.accuracy(images, asked)
    assert found["accuracy"] == 0
    assert {v for k, v in found.items() if k != "accuracy"} == {0.75}


def test_what_no_caption_describes_reads_as_none():
    rng = np.random.default_rng(0)
    red, blue = shapes.draw(["one red circle on the left", "one blue circle on the right"], 3)
    square = shapes.draw(["one red square on the right"], 3)[0]
    empty = shapes.draw(["one red cross on the left"], 0)[0, :, :1, :1].expand(3, 32, 32)
    two_colours, two_shapes = torch.maximum(red, blue), torch.maximum(red, square)
    static = torch.from_numpy(rng.integers(0, 256, (3, 32, 32)).astype(np.uint8))
    bar = empty.clone()
    bar[:, 15:18, 2:30] = torch.tensor([225, 50, 50], dtype=torch.uint8)[:, None, None]
    images = torch.stack([two_colours, two_shapes, empty, static, bar, 255 - empty])
    assert shapes.read(images) == [None] * 6
    assert shapes.read(red[None]) == [shapes.parse("one red circle on the left")]


def test_reading_a_picture_does_not_depend_on_the_others():
    images = shapes.draw(shapes.captions(40, 5), 5)
    assert shapes.read(images) == [shapes.read(image[None])[0] for image in images]


def test_pictures_and_captions_that_do_not_fit_are_refused():
    with pytest.raises(MetricError, match="float32 3×32×32; it takes uint8"):
        shapes.read(torch.zeros(2, 3, 32, 32))
    with pytest.raises(MetricError, match="2 images for 1 captions"):
        shapes.accuracy(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), ["one red cross on the left"])


# The protocol


def test_the_classifier_reads_scenes_it_never_saw():
    wanted = shapes.captions(1000, 2_000_000)
    truth = labels([shapes.parse(c) for c in wanted])
    with torch.no_grad():
        logits = classifier()(shapes.draw(wanted, 2_000_000).float() / 127.5 - 1)
    guess = torch.stack([v.argmax(1) for v in logits], 1)
    assert (guess == truth).all(1).double().mean() > 0.98
    assert [len(h) for h in HEADS] == [v.shape[1] for v in logits]


def test_the_protocols_floor_is_small_and_every_wrong_picture_costs():
    measure, best = protocol("shapes"), floor("shapes", splits=1)
    assert best["accuracy"] > 0.999 and best["coverage"] > 0.9
    shifted = measure.prompts[360:] + measure.prompts[:360]
    wrong = [*shifted[1:], shifted[0]]  # each picture shows its neighbour's caption
    mixed = measure(lambda p, seed: Samples(shapes.draw(wrong, seed), p, 1.0), seeds=1)
    assert mixed["accuracy"] == 0
    assert mixed["fd"] < 3 * best["fd"]  # the set as a whole is as good
    reds = [c.replace("green", "red") for c in measure.prompts]
    dropped = measure(lambda p, seed: Samples(shapes.draw(reds, seed), p, 1.0), seeds=1)
    assert dropped["colour_accuracy"] == pytest.approx(5 / 6, abs=1e-3)
    assert dropped["shape_accuracy"] > 0.999
    assert dropped["fd"] > 10 * best["fd"]


def test_shapes_features_take_shapes_only():
    with pytest.raises(MetricError, match="images are 1×8×8; it takes 3×32×32"):
        shapes.features(torch.zeros(100, 1, 8, 8, dtype=torch.uint8))


# Teaching


def test_the_tokenizer_gives_every_caption_a_token_for_each_word():
    every = shapes.all_captions()
    tokenizer = clip_tokenizer(every, 16)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer(every).input_ids
    assert all(i[0] == begin and i[-1] == end for i in ids)
    assert [len(i) - 2 for i in ids] == [len(c.split()) for c in every]
    assert len({tuple(i) for i in ids}) == len(every)
    assert tokenizer("").input_ids == [begin, end]
    strange = tokenizer("ünder a Fox!").input_ids
    assert end not in strange[1:-1]  # bytes, and not the unknown token
    assert tokenizer.model_max_length == 16


def test_the_saved_tokenizer_is_in_clips_own_files(tmp_path):
    from transformers import CLIPTokenizer

    config = TextRecipe.check(recipe(), "r")
    every = shapes.all_captions()
    pipe = pipeline(config, every, "r")
    save(pipe, tmp_path / "teacher")
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (bare / name).write_text((tmp_path / "teacher/tokenizer" / name).read_text())
    again = CLIPTokenizer.from_pretrained(bare)
    assert again(every).input_ids == pipe.tokenizer(every).input_ids
    assert again.model_max_length == 16


def test_a_taught_teacher_is_a_stock_pipeline_and_resumes_exactly(tmp_path):
    from diffusers import StableDiffusionPipeline

    def taught(name, resume, *overrides):
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump(recipe(*overrides)))
        args = ["teach", str(file), "--out", str(tmp_path / name)] + ["--resume"] * resume
        result = CliRunner().invoke(app, args, catch_exceptions=False)
        assert result.exit_code == 0
        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / name / "teacher")
        return pipe, samples(pipe, ["one red cross on the left"] * 2, 0, 2, 3.0)

    pipe, whole = taught("whole", False)
    assert whole.shape == (2, 3, 32, 32)
    assert pipe.vae.config.scaling_factor != 0.18215
    # the last checkpoint of the second stage is from its third step; a run that stopped there goes
    # on to four as one that never stopped
    for stage in ("vae", "unet"):
        assert (tmp_path / "whole/checkpoints" / stage).is_dir()
    lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 1, 2, 3]
    flat = {
        "constant": ["train.vae.optimizer.decay=constant", "train.unet.optimizer.decay=constant"]
    }
    _, straight = taught("straight", False, "train.unet.steps=5", *flat["constant"])
    taught("broken", False, "train.unet.steps=3", *flat["constant"])
    (tmp_path / "broken/recipe.yaml").write_text((tmp_path / "straight/recipe.yaml").read_text())
    _, resumed = taught("broken", True, "train.unet.steps=5", *flat["constant"])
    assert torch.equal(straight, resumed)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("unet.block_out_chanels=[8,8]", ("r", "unet.block_out_chanels")),
        ("vae.latent_chanels=4", ("r", "vae.latent_chanels", "latent_channels")),
        ("text_encoder.heads=2", ("r", "text_encoder.heads")),
        ("unet.norm_num_groups=3", ("r", "8", "3")),
        ("unet.sample_size=16", ("r", "unet.sample_size", "16", "32")),
        ("scheduler.class=DDIM", ("r", "scheduler.class")),
        ("scheduler.prediction_type=sample", ("r", "v_prediction", "sample")),
        ("text_encoder.max_position_embeddings=7", ("r", "8")),
        ("train.unet.drop=1.5", ("r", "train.unet.drop")),
        ("train.unet.dorp=0.1", ("r", "train.unet.dorp", "drop")),
        ("data.source=cats", ("r", "data.source", "shapes", "cats")),
    ],
)  # fmt: skip
def test_a_mistake_in_the_recipe_is_one_line(change, line):
    with refused(*line):
        pipeline(TextRecipe.check(recipe(change), "r"), shapes.all_captions(), "r")


# The embedded teacher


def test_the_embedded_teacher_is_small_and_is_what_its_recipe_describes():
    files = [p for p in TEACHER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 10e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    described = TextRecipe.check(read_yaml(find(RECIPE)), RECIPE)
    measured = json.loads((TEACHER / "measurements.json").read_text())
    assert TextRecipe.check(measured["recipe"], "measured").tree() == described.tree()
    for part in ("vae", "unet", "text_encoder"):
        config = json.loads((TEACHER / part / "config.json").read_text())
        for key, value in measured["recipe"][part].items():
            assert config[key] == value, f"{part}.{key}"
    latents = json.loads((TEACHER / "vae/config.json").read_text())["scaling_factor"]
    assert latents == pytest.approx(measured["stages"]["vae"]["scaling_factor"])


def test_the_embedded_teacher_draws_what_it_is_asked_for():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(TEACHER)
    asked = shapes.all_captions()[::11][:32]
    images = to_uint8(samples(pipe, asked, seed=0, steps=15, guidance=3.0))
    assert shapes.accuracy(images, asked)["accuracy"] > 0.8
    with torch.no_grad():
        real = shapes.draw(asked, 0)
        latents = pipe.vae.encode(real.float() / 127.5 - 1).latent_dist.mean
        again = to_uint8(pipe.vae.decode(latents).sample)
    assert shapes.accuracy(again, asked)["accuracy"] > 0.95
    assert (latents * pipe.vae.config.scaling_factor).std() == pytest.approx(1, abs=0.1)
