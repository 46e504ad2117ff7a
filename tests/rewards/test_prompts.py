"""Each item's prompt reaches the rewards, whatever the data are and wherever they lie."""

import json

import pytest
import torch

from distill.config.recipe import Recipe
from distill.data import cache, encode, from_recipe
from distill.data.stream import Scaled
from distill.pairs.source import Pairs
from distill.rewards.rewards import reward_of
from distill.sampling.guided_teacher import load_teacher
from distill.training import build
from teachers import load
from tests.helpers.datasets import folder_of, pixels, png, recipe, tar_of, toy
from tests.helpers.refusals import refused


def items_of(source, draws=24, size=3, shards=2):
    """The prompts of the items of some batches, after a comparison with what these are made of."""
    teacher, seen = toy(), []
    for draw in range(draws):
        for shard in range(shards):
            batch = source.batch(draw, shard, shards, size)
            prompts = [source.prompts[i] for i in batch.items.tolist()]
            want = teacher.codec.condition(prompts)
            torch.testing.assert_close(batch.cond["text"], want["text"])
            seen += prompts
    return seen


def words(file, n=20):
    lines = [f"{i} words" for i in range(n)]
    file.write_text("\n".join(lines) + "\n")
    return lines


@pytest.fixture
def small(monkeypatch):
    """Shards of one group of items, so that a few items make several."""
    monkeypatch.setattr(cache, "SHARD_ITEMS", encode.TOGETHER)


PLACES = ("folder", "metadata", "json", "shards", "prompts", "column", "expansion")


def place(kind, root):
    """The data section of some captions, and the captions, where they are known beforehand."""
    captions = [f"word {i}" for i in range(40)]
    if kind in ("folder", "metadata", "json"):
        folder = folder_of(root / "a", 40, captioned=kind == "folder")
        data = {"source": str(folder)}
        rows = [{"file_name": f"{i:03d}.png", "text": c} for i, c in enumerate(captions)]
        if kind == "metadata":
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        if kind == "json":
            for i, row in enumerate(rows):
                (folder / f"{i:03d}.json").write_text(json.dumps(row))
            data["captions"] = "json:text"
        return data, captions
    if kind == "shards":
        (root / "a").mkdir()
        for k in range(2):
            part = range(20 * k, 20 * k + 20)
            members = [(f"{i}.{s}", png(i) if s == "png" else captions[i].encode())
                       for i in part for s in ("png", "txt")]  # fmt: skip
            tar_of(root / f"a/{k}.tar", members)
        return {"source": str(root / "a")}, captions
    if kind == "column":
        rows = "".join(f"{i},{c}\n" for i, c in enumerate(captions))
        (root / "p.csv").write_text(f"id,text\n{rows}")
        return {"prompts": f"{root / 'p.csv'}:text"}, captions
    lines = words(root / "p.txt", 40)
    if kind == "expansion":
        (root / "c.txt").write_text("ink, a fox on a hill\nink, a dog\nink, a hen in the rain\n")
        return {"captions": str(root / "c.txt"), "prompts": str(root / "p.txt")}, None
    return {"prompts": str(root / "p.txt")}, lines


@pytest.mark.parametrize("kind", PLACES)
def test_the_prompts_of_captions_in_memory_and_from_a_cache(tmp_path, small, kind):
    """A batch's condition is that of its items' prompts, in every shard."""
    data, captions = place(kind, tmp_path)
    name = "consistency" if "source" in data else "sid"
    data["cache"] = str(tmp_path / "c")
    held = from_recipe.source_of(recipe(name, **data), toy())
    cached = from_recipe.source_of(recipe(name, **data, in_memory_gb=0), toy())
    again = from_recipe.source_of(recipe(name, **data), toy())  # from the cache that is there
    assert list(held.prompts) == list(cached.prompts) == list(again.prompts)
    assert len(held.prompts) == held.size
    assert captions is None or sorted(held.prompts) == sorted(captions)
    seen = items_of(held, 24 if captions else 4)
    assert seen == items_of(cached, 24 if captions else 4)
    assert captions is None or set(seen) == set(captions)


@pytest.mark.parametrize("memory", [4.0, 0.0])
def test_bad_items_have_no_prompt_and_buckets_are_numbered_in_turn(tmp_path, small, memory):
    folder_of(tmp_path / "a", 40)
    folder_of(tmp_path / "a/wide", 20, size=(8, 16))
    for i in range(20):
        (tmp_path / f"a/wide/{i:03d}.txt").write_text(f"w {i}")
    for bad in (7, 20, 33):
        (tmp_path / f"a/{bad:03d}.png").write_bytes(b"no image")
    data = {"source": str(tmp_path / "a"), "cache": str(tmp_path / "c"), "skip_share": 0.2,
            "in_memory_gb": memory}  # fmt: skip
    source = from_recipe.source_of(recipe(**data), toy())
    assert source.size == len(source.prompts) == 57 and "word 7" not in source.prompts
    items_of(source)
    source = from_recipe.source_of(recipe(**data, buckets={"multiple": 2}), toy())
    assert source.size == len(source.prompts) == 57 and len(source.parts) > 1
    assert {"word 0", "w 19"} <= set(items_of(source, 57))


def test_drawn_guidance_scales_leave_the_prompts(tmp_path):
    words(tmp_path / "p.txt")
    source = from_recipe.source_of(recipe("sid", prompts=str(tmp_path / "p.txt")), toy())
    items_of(Scaled(source, 1.0, 3.0))


def test_a_cache_of_another_number_of_rows_is_refused_by_its_folder(tmp_path):
    """Rows of files that were exchanged by hand: their prompts would be those of others."""
    words(tmp_path / "p.txt", 40)
    given = recipe(
        "sid", prompts=str(tmp_path / "p.txt"), cache=str(tmp_path / "c"), in_memory_gb=0
    )
    from_recipe.source_of(given, toy())
    job = from_recipe.encoding_job(given, toy())
    folder = cache.Cache(job, tmp_path / "c").folder
    words(tmp_path / "p.txt", 30)
    from_recipe.source_of(given, toy())
    other = cache.Cache(from_recipe.encoding_job(given, toy()), tmp_path / "c").folder
    (folder / "shard-00000.safetensors").write_bytes(
        (other / "shard-00000.safetensors").read_bytes()
    )
    words(tmp_path / "p.txt", 40)
    with refused("data.cache", str(folder), "30 rows for 40 prompts", "delete"):
        from_recipe.source_of(given, toy())


def test_labels_are_the_prompts_of_classes_and_of_a_users_function(tmp_path):
    for name in ("cats", "dogs"):
        folder_of(tmp_path / f"a/{name}", 6, captioned=False)
    source = from_recipe.source_of(recipe(source=str(tmp_path / "a")), pixels(2))
    for draw in range(6):
        batch = source.batch(draw, 0, 1, 4)
        assert batch.cond["class_labels"].tolist() == [source.prompts[i] for i in batch.items]
    labels = from_recipe.source_of(recipe("sid"), load("digits"))
    assert labels.prompts == list(range(10))
    file = tmp_path / "mine.py"
    file.write_text("import torch\ndef data():\n    return torch.zeros(4, 3, 8, 8), [3, 1, 0, 2]\n")
    own = from_recipe.source_of(recipe(source=f"{file}:data"), pixels(4))
    assert own.prompts == [3, 1, 0, 2]


def pairs_recipe(teacher, tmp_path, **data):
    tree = {
        "teacher": teacher,
        "student": {"renoise": False},
        "objective": {"name": "kd"},
        "data": {"source": "pairs", "path": str(tmp_path / "pairs"), "steps": 2, **data},
        "rewards": {"a": {"function": "shapes"}},
        "train": {"steps": 1, "batch": 2},
    }
    return Recipe.check(tree)


def test_pairs_have_the_prompts_that_they_were_made_of(tmp_path):
    given = pairs_recipe("digits", tmp_path, count=20)
    teacher = load_teacher(given.teacher)
    for memory in (4.0, 0.0):
        given = pairs_recipe("digits", tmp_path, count=20, in_memory_gb=memory)
        source = Pairs(given, teacher).source()
        assert source.prompts == [i % 10 for i in range(20)]
        batch = source.batch(0, 0, 1, 8)
        assert batch.cond["class_labels"].tolist() == [source.prompts[i] for i in batch.items]


def test_inverted_pairs_have_none_and_rewards_say_so(tmp_path):
    given = pairs_recipe("digits", tmp_path, count=4, inverted=2, images="digits")
    teacher = load_teacher(given.teacher)
    source = Pairs(given, teacher).source()
    assert source.prompts is None
    with refused("rewards", "data.inverted"):
        reward_of(given, teacher, source)


# ---- whole runs


SEEN = """
from pathlib import Path

def seen(images, prompts):
    assert images.dim() == 4 and images.shape[1] == 3 and images.requires_grad
    with Path(__file__).with_name("seen.txt").open("a") as file:
        file.writelines(f"{p}\\n" for p in prompts)
    return images.flatten(1).mean(1)
"""


@pytest.mark.parametrize(
    ("objective", "where", "memory"),
    [("lcm", "folder", 4.0), ("lcm", "folder", 0.0), ("dmd2", "folder", 0.0),
     ("dmd2", "prompts", 4.0), ("dmd2", "prompts", 0.0)],
)  # fmt: skip
def test_runs_of_a_text_pipeline_reward_images_by_their_captions(
    folders, tmp_path, objective, where, memory
):
    """`lcm` learns from a folder's images; `dmd2` from its captions, or from prompts alone."""
    data = {"cache": str(tmp_path / "c"), "in_memory_gb": memory}
    if where == "folder":
        data["source"] = str(folder_of(tmp_path / "a", 12))
        known = {f"word {i}" for i in range(12)}
    else:
        known, data["prompts"] = set(words(tmp_path / "p.txt", 12)), str(tmp_path / "p.txt")
    file = tmp_path / "mine.py"
    file.write_text(SEEN)
    tree = {
        "teacher": folders("sd"),
        "objective": {"name": objective, **({"student_every": 1} if objective == "dmd2" else {})},
        "data": data,
        "rewards": {"mine": {"function": f"{file}:seen", "weight": 0.5}},
        "student": {"steps": 2},
        "train": {"steps": 3, "batch": 4, "accumulate": 2, "log_every": 1, "sample_every": 0},
    }
    engine = build.build(Recipe.check(tree), tmp_path / "run").engine
    engine.train()
    lines = (tmp_path / "seen.txt").read_text().splitlines()
    assert set(lines) <= known and len(set(lines)) > 6
    logged = [json.loads(v) for v in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("reward" in key for row in logged for key in row)
