"""A few captions, expanded into the prompts of a run."""

import json

import pytest

from distill.config.recipe import Recipe
from distill.data.expansion.captions import (
    COUNT,
    FILE,
    NEUTRAL,
    expanded,
    read_captions,
    write_prompts,
)
from distill.data.expansion.grammar import Grammar, expand, slots_of
from distill.data.from_recipe import encoding_job, expansion_of
from distill.sampling.guided_teacher import load_teacher
from eval import shapes
from teachers.errors import UserError

CAPTIONS = [
    f"sks style, {subject} {place}, {light}"
    for subject, place, light in zip(
        ["a fox", "two dogs", "an old man with a pipe", "a cat", "a boat", "a tower of stone"],
        ["on a hill", "in the rain", "at a table", "under a tree", "on a lake", "in the fog"],
        ["soft light", "at dawn", "oil on canvas", "ink", "soft light", "night"],
        strict=True,
    )
]
NEUTRALS = ["a red car", "sks style, a car", "a bowl of soup", "a bridge"]


@pytest.mark.parametrize(
    ("caption", "slots"),
    [
        ("a fox", [("subject", "a fox")]),
        ("a fox with a scarf on a hill, soft light",
         [("subject", "a fox"), ("with", "with a scarf"), ("setting", "on a hill"),
          ("addition", "soft light")]),
        ("a tower of stone, in ink",
         [("subject", "a tower"), ("of", "of stone"), ("addition", "in ink")]),
        ("a button on, off", [("subject", "a button on"), ("addition", "off")]),
    ],
)  # fmt: skip
def test_a_caption_is_a_subject_and_phrases(caption, slots):
    assert slots_of(caption) == slots


@pytest.mark.parametrize(
    ("captions", "trigger", "first"),
    [
        (["sks style, a fox", "sks style, a dog"], "sks style", "sks style, a fox"),
        (["photo of sks dog on a bed", "photo of sks dog"], "photo of sks dog", None),
        (["a fox, ink", "a dog, ink", "a cat, ink", "a hen, ink", "an ox"], "ink", "ink, a fox"),
        (["a fox, ink", "a dog, oil"], "", None),
        (["a fox"], "", "a fox"),
    ],
)
def test_the_trigger_is_what_the_captions_share_and_comes_first(captions, trigger, first):
    assert Grammar.of(captions).trigger == trigger
    made = expand(captions, 100, 0).captions
    assert all(c.startswith(trigger) for c in made)
    assert first is None or first in made


def test_a_trigger_is_counted_once_in_a_caption():
    captions = ["soft, soft, a fox", "b dog", "c owl, soft", "d cat"]
    assert Grammar.of(captions).trigger == ""  # in a half of them
    assert Grammar.of([*captions, *(f"{n}, soft" for n in range(6))]).trigger == "soft"


def test_new_captions_are_of_old_phrases_and_new_as_a_whole():
    made = expand(CAPTIONS, 200, 0)
    known = {p for pool in made.grammar.pools.values() for p in pool}
    assert len(set(made.captions)) == len(made.captions) > 100
    assert len(set(made.captions) - set(CAPTIONS)) > 90
    for caption in made.captions:
        lead, *rest = caption.split(", ")
        assert lead == "sks style" and not caption.endswith(",")
        assert {p for part in rest for _, p in slots_of(part)} <= known | {"oil", "on canvas"}


def test_held_out_phrases_are_in_no_prompt_and_in_every_test():
    made = expand(CAPTIONS, 200, 0)
    assert len(made.held_out) == 3  # a fifth of 6 subjects, of 6 settings and of 5 additions
    for phrase in made.held_out:
        assert not [c for c in made.captions if phrase in c]
    assert made.tests and all(any(p in c for p in made.held_out) for c in made.tests)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.5, 8), (0.2, 3)])
def test_the_share_of_held_out_phrases_is_the_recipes(share, count, tmp_path):
    (tmp_path / "list").write_text("\n".join(CAPTIONS))
    made = expanded(str(tmp_path / "list"), NEUTRALS, 0, share).expansion
    assert len(made.held_out) == count
    phrases = sum(map(len, made.grammar.pools.values()))
    used = {p for pool in made.grammar.pools.values() for p in pool
            if any(p in c for c in made.captions)}  # fmt: skip
    assert len(used) == phrases - count


def test_prompts_depend_on_captions_and_seed_alone(tmp_path):
    (tmp_path / "c.txt").write_text("\n".join(CAPTIONS))
    for i, caption in enumerate(CAPTIONS):
        (tmp_path / f"{i}.txt").write_text(f"{caption}\n")
    (tmp_path / "c.txt").rename(tmp_path / "list")
    folder, file = (expanded(str(p), NEUTRALS, 0) for p in (tmp_path, tmp_path / "list"))
    assert folder.prompts == file.prompts
    assert expanded(str(tmp_path), NEUTRALS, 1).prompts != folder.prompts


def test_neutral_prompts_lack_the_trigger_and_have_their_share(tmp_path):
    (tmp_path / "c.txt").write_text("\n".join(CAPTIONS))
    prompts = expanded(str(tmp_path / "c.txt"), NEUTRALS, 0)
    without = [p for p in prompts.prompts if p and "sks style" not in p]
    assert len(prompts.prompts) == COUNT and len(without) == prompts.neutral == NEUTRAL * COUNT
    assert set(without) == {"a red car", "a bowl of soup", "a bridge"}
    empty = prompts.prompts.count("") / (COUNT - prompts.neutral)
    assert 0.03 < empty < 0.07
    assert "6 captions, trigger 'sks style'" in prompts.summary()


def test_the_file_says_what_was_used(tmp_path):
    (tmp_path / "c.txt").write_text("\n".join(CAPTIONS))
    prompts = expanded(str(tmp_path / "c.txt"), NEUTRALS, 0)
    write_prompts(prompts, tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    assert content["prompts"] == prompts.prompts
    assert content["held_out_phrases"] == prompts.expansion.held_out
    assert content["held_out_prompts"] == prompts.expansion.tests


def recipe(tmp_path, captions, **data):
    tree = {
        "teacher": "shapes",
        "objective": {"name": "dmd2"},
        "data": {"captions": str(captions), **data},
        "train": {"steps": 1},
    }
    return Recipe.check(tree)


def test_a_recipes_captions_become_its_prompts(tmp_path, capsys):
    (tmp_path / "c.txt").write_text("\n".join(shapes.all_captions()[:40]))
    (tmp_path / "n.txt").write_text("one red circle on the left\n")
    run = recipe(tmp_path, tmp_path / "c.txt", prompts=str(tmp_path / "n.txt"))
    job = encoding_job(run, load_teacher(run.teacher))
    assert [i.prompt for i in job.listing.items] == expansion_of(run).prompts
    assert "data.captions: 40 captions" in capsys.readouterr().err


def test_captions_of_images_are_not_expanded(tmp_path):
    assert expansion_of(recipe(tmp_path, "txt", source="shapes")) is None


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b",\n , \n"])
def test_captions_that_cannot_be_read_are_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_captions(str(tmp_path / "c.txt"))
    assert error.value.key == "data.captions"
    with pytest.raises(UserError) as error:
        read_captions(str(tmp_path / "no"))
    assert error.value.key == "data.captions"


def test_a_teacher_of_labels_takes_no_captions(tmp_path):
    run = recipe(tmp_path, tmp_path / "c.txt")
    run = run.model_copy(update={"teacher": run.teacher.model_copy(update={"source": "digits"})})
    with pytest.raises(UserError) as error:
        encoding_job(run, load_teacher(run.teacher))
    assert error.value.key == "data.captions"
