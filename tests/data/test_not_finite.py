"""NaN and infinity are named where they first appear, and nothing is written of them."""

import math

import pytest
import torch
import yaml

from distill.config.recipe import Recipe
from distill.data import cache, encode, from_recipe
from distill.data.encode import NotFinite, check_finite
from distill.training import build, networks
from teachers.denoiser import Denoiser
from tests.helpers.command_line import called
from tests.helpers.datasets import folder_of, pixels, recipe, toy
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree


@pytest.fixture
def small(monkeypatch):
    """Shards of one group of items, so that a few items make several."""
    monkeypatch.setattr(cache, "SHARD_ITEMS", encode.TOGETHER)


def spoilt_for(teacher, which, value=math.nan):
    """The teacher, its codec giving no number for the picture or the prompt of one item."""
    codec = teacher.codec
    encode_, words = codec.encode, codec.words.forward
    seen = []

    def encoding(images):
        found = encode_(images).clone()
        for row in range(len(images)):
            if len(images) > 1 or seen:  # the first is the grey picture that is tried
                seen.append(row)
            if which == ("picture", len(seen) - 1):
                found[row, 1, 2, 0] = value
        seen.append(None) if not seen else None
        return found

    def reading(prompts):
        found = words(prompts).clone()
        for row, prompt in enumerate(prompts):
            if which == ("prompt", prompt):
                found[row, 1, 2] = value
        return found

    codec.encode, codec.words.forward = encoding, reading
    return teacher


@pytest.mark.parametrize("memory", [4.0, 0.0])
@pytest.mark.parametrize(
    ("which", "call"),
    [(("picture", 37), "codec.encode"), (("prompt", "word 37"), "codec.condition, text (")],
)
@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (-math.inf, "infinity")])
def test_an_encoders_first_value_that_is_no_number_is_named_and_nothing_is_kept(
    tmp_path, small, memory, which, call, value, kind
):
    a = folder_of(tmp_path / "a", 40)
    data = {"source": str(a), "cache": str(tmp_path / "c"), "in_memory_gb": memory}
    shift = 1 if which[0] == "picture" else 0  # the trial comes first
    which = (which[0], which[1] + shift) if shift else which
    with pytest.raises(NotFinite) as error:
        from_recipe.source_of(recipe(**data), spoilt_for(toy(), which, value))
    line = str(error.value)
    assert f"{a / '037.png'}: teacher 'toy' made {kind} of it in {call}" in line
    assert "\n" not in line
    assert not list((tmp_path / "c").glob("*/"))  # a half cache would never be read
    assert from_recipe.source_of(recipe(**data), toy()).size == 40


def test_an_empty_prompt_that_is_no_number_is_named_too(tmp_path):
    data = {"source": str(folder_of(tmp_path / "a", 4)), "cache": str(tmp_path / "c")}
    for memory in (4.0, 0.0):
        with pytest.raises(NotFinite, match="the empty or negative prompt: teacher 'toy' made NaN"):
            from_recipe.source_of(
                recipe(**data, in_memory_gb=memory), spoilt_for(toy("ugly"), ("prompt", "ugly"))
            )
    assert not (tmp_path / "c").exists()


def test_a_network_that_always_fails_is_named_before_a_cache_is_begun(tmp_path):
    data = {"source": str(folder_of(tmp_path / "a", 4)), "cache": str(tmp_path / "c")}
    teacher = toy()
    with torch.no_grad():
        teacher.codec.words.mix.weight[0, 0] = math.nan
    with pytest.raises(
        NotFinite,
        match=r"codec\.condition, text .*: Words's weight mix\.weight is not finite; .* again",
    ):
        from_recipe.source_of(recipe(**data, in_memory_gb=0), teacher)
    assert not (tmp_path / "c").exists()


def test_of_a_vae_in_half_precision_the_remedy_is_its_precision():
    teacher = pixels()
    teacher.codec.vae = torch.nn.Conv2d(3, 4, 2).half()
    found = {"x": torch.tensor([[1.0], [math.inf]])}
    with pytest.raises(NotFinite) as error:
        check_finite(found, ["a.png", "b.png"], teacher, "data.source: 'x'")
    line = str(error.value)
    assert line.startswith("data.source: 'x': b.png: teacher 'pixels' made infinity of it in")
    assert "(Conv2d): float16 overflows in it; load it in float32 or bfloat16" in line


def run_of(pipelines, tmp_path, **train):
    tree = recipe_tree("dmd2", pipelines["edm"], **train)
    tree["data"] = {"source": "digits"}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_teacher_whose_answer_is_no_number_is_named_before_a_run_folder_exists(
    pipelines, tmp_path, capsys, monkeypatch
):
    load = build.load_teacher

    def spoilt(recipe):
        teacher = load(recipe)
        with torch.no_grad():
            teacher.denoiser.backbone.conv_out.bias.fill_(math.nan)
        return teacher

    monkeypatch.setattr(build, "load_teacher", spoilt)
    path = run_of(pipelines, tmp_path)
    code, _, err = called(capsys, "run", path, "--out", tmp_path / "run")
    assert code == 2
    assert "its network's x̂ of the first batch holds NaN, before any training" in err
    assert "its weight backbone.conv_out.bias is not finite" in err
    assert ".lr" not in err
    assert not (tmp_path / "run").exists()


class Overflowing(Denoiser):
    """Guidance that has left the range of floats."""

    def __init__(self, inner):
        super().__init__()
        self.process, self.inner = inner.process, inner

    def forward(self, x_t, t, cond=None, s=None):
        return self.inner(x_t, t, cond) * math.inf


def test_guidance_is_told_from_the_network_that_it_guides(pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "guided", lambda recipe, teacher: Overflowing(teacher.denoiser))
    with refused("teacher.guidance", "teacher.guidance"):
        build.build(Recipe.check(recipe_tree("dmd2", pipelines["edm"])), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_are_no_numbers_are_blamed_before_the_network(pipelines, tmp_path, monkeypatch):
    found = build.source_of

    def spoilt(recipe, teacher):
        source = found(recipe, teacher)
        source.x = torch.full_like(source.x, math.nan)  # the digits themselves are shared
        return source

    monkeypatch.setattr(build, "source_of", spoilt)
    tree = recipe_tree("dmd2", pipelines["edm"])
    with refused("data", "NaN"):
        build.build(Recipe.check(tree), tmp_path / "run")
    assert not (tmp_path / "run").exists()
