"""Pairs on disk: what they hold, killed and shared making, refusals, and runs on them."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.config.recipe import Recipe
from distill.pairs import folder as folders
from distill.pairs.folder import fill
from distill.pairs.making import Maker, invert
from distill.pairs.settings import recipe_of, settings_of
from distill.pairs.source import Pairs
from distill.sampling.guided_teacher import guided, load_teacher
from distill.training import build
from teachers.analytic import Gaussian
from teachers.process import Karras, Linear, Tabulated, Trig
from teachers.solver import solve
from tests.helpers.command_line import called
from tests.helpers.refusals import refused

GAUSSIAN = "analytic:gaussian"


def settings(source=GAUSSIAN, guidance=None, **data):
    return settings_of(recipe_of(source, {"count": 40, "steps": 6, **data}, guidance))


def made(folder, given):
    teacher = load_teacher(given.teacher)
    return fill(folder, given, teacher), teacher


def recipe(source, path=None, train=None, **data):
    tree = {
        "teacher": {"source": str(source)},
        "student": {"renoise": False},
        "objective": {"name": "kd"},
        "data": {"source": "pairs", **({} if path is None else {"path": str(path)}), **data},
        "train": {"steps": 2, "batch": 8, "log_every": 1, "sample_every": 0, **(train or {})},
    }
    return Recipe.check(tree)


def test_a_pair_is_seeded_noise_and_the_solvers_sample_of_it(tmp_path):
    given = settings(solver="heun")
    index, teacher = made(tmp_path / "pairs", given)
    tensors = load_file(tmp_path / "pairs" / "pairs-00000.safetensors")
    assert tensors["noise"].shape == tensors["x"].shape == (40, 2)
    expected = solve(guided(given.teacher, teacher), tensors["noise"], 6, "heun")
    torch.testing.assert_close(tensors["x"], expected)
    assert len(tensors["noise"].unique()) == 80
    assert index["evaluations"] == 40 * 11  # Heun's six steps
    assert (index["pairs"], index["shape"], index["dtype"]) == (40, [2], "float32")
    assert (index["solver"], index["steps"], index["seed"]) == ("heun", 6, 0)


def test_a_pair_depends_on_the_seed_and_its_number_and_not_on_how_many_there_are():
    few, many, other = (
        Maker(s, load_teacher(s.teacher)).make(range(3))[0]
        for s in (settings(), settings(count=90), settings_of(recipe_of(GAUSSIAN, {}, seed=1)))
    )
    assert torch.equal(few["noise"], many["noise"]) and torch.equal(few["x"], many["x"])
    assert not torch.equal(few["noise"], other["noise"])


def test_the_making_of_a_large_file_is_counted_batch_by_batch(tmp_path):
    """A file may take hours, and its pairs and evaluations are those of one batch."""
    given = settings()
    whole = Maker(given, load_teacher(given.teacher))
    tensors, evaluations = whole.make(range(10))
    parts = Maker(given, whole.teacher)
    parts.batch = 4
    found = parts.make(range(10))
    assert found[1] == evaluations
    assert all(torch.equal(found[0][k], tensors[k]) for k in ("noise", "prompt"))
    torch.testing.assert_close(found[0]["x"], tensors["x"])
    shard = folders.Shard("pairs-00000.safetensors", range(10))
    assert list(folders.make(tmp_path, parts, [shard])) == [4, 8, 10, 10]
    assert (tmp_path / shard.file).is_file()


@pytest.mark.parametrize(
    "process", [Karras(), Linear(), Linear(3.0), Trig(0.5), Tabulated.scaled_linear()]
)
def test_inverted_data_lead_back_to_themselves_and_are_the_flow_maps_noise(process):
    mean, values = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.25, 1.0]).double()
    teacher = Gaussian(mean, values, process)
    x = teacher.sample(6)
    z = invert(teacher, x, 200)
    start = process.noise(torch.zeros_like(x), torch.ones(6).double(), z)
    t, s = torch.ones(6).double(), process.time(torch.full((6,), 0.002).double()).clamp(min=0)
    alpha = process.at(s, x)[0]
    torch.testing.assert_close(teacher.flow(start, t, s) / alpha, x, rtol=0.02, atol=0.02)


def test_inverted_pairs_follow_the_others_and_hold_data(tmp_path):
    given = settings("digits", count=3, inverted=2, images="digits", steps=4)
    index, teacher = made(tmp_path / "pairs", given)
    tensors = load_file(tmp_path / "pairs" / "pairs-00000.safetensors")
    assert tensors["prompt"].tolist() == [0, 1, 2, -1, -1]
    digits = teacher.codec.encode(load_digits())
    for x in tensors["x"][3:]:
        assert (digits == x).flatten(1).all(1).any()
    assert index["evaluations"] == 3 * 7 + 2 * 6
    assert 0.5 < tensors["noise"][3:].std() < 1.5


def load_digits():
    from eval import digits

    return digits.data()[0]


def test_text_and_guidance_are_those_of_each_pairs_prompt(tmp_path):
    given = settings("shapes", guidance=2.0, count=3, steps=2, solver="ddim")
    index, teacher = made(tmp_path / "pairs", given)
    tensors = load_file(tmp_path / "pairs" / "pairs-00000.safetensors")
    prompts = Maker(given, teacher).prompts
    places = tensors["prompt"].tolist()
    assert len(set(places)) == 3 and places != [0, 1, 2]  # from the whole list
    cond = teacher.codec.condition([prompts[i] for i in places])
    assert index["conditions"] == {k: list(v.shape[1:]) for k, v in cond.items()}
    for name, entry in cond.items():
        torch.testing.assert_close(tensors[f"cond.{name}"], entry)
    expected = solve(guided(given.teacher, teacher), tensors["noise"], 2, "ddim", cond)
    torch.testing.assert_close(tensors["x"], expected, rtol=1e-4, atol=1e-4)
    assert index["evaluations"] == 3 * 2 * 2  # guidance doubles them
    run = Pairs(recipe_like(given, tmp_path / "pairs"), teacher).source()
    batch = run.batch(0, 0, 1, 3)
    order = [[torch.equal(n, m) for m in tensors["noise"]].index(True) for n in batch.noise]
    assert sorted(order) == [0, 1, 2]
    assert torch.equal(batch.x, tensors["x"][order])
    name = next(iter(cond))
    assert torch.equal(batch.cond[name], tensors[f"cond.{name}"][order])


def recipe_like(given, path):
    tree = recipe(given.teacher.source, path).tree()
    return Recipe.check({**tree, "teacher": given.teacher.model_dump(mode="json")})


# ---- killed, shared


def forked(folder, rank=0, world=1, pause=0.0):
    """Make 40 pairs, 8 to a file, in a child process."""
    if child := os.fork():
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        folders.SHARD = 8
        save = folders.save

        def slow(*args):
            save(*args)
            time.sleep(pause)

        folders.save = slow
        made(folder, settings())
        code = 0
    finally:
        os._exit(code)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_killed_making_goes_on_to_the_same_bytes_and_two_processes_share_it(tmp_path):
    killed = forked(tmp_path / "killed", pause=0.2)
    until = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("pairs-*"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(killed, signal.SIGKILL)
    assert ended(killed) == -signal.SIGKILL
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("pairs-*")}
    assert 2 <= len(before) < 5
    assert not (tmp_path / "killed" / "index.json").exists()
    with refused("data.path", "not finished", "distill pairs"):
        Pairs(recipe(GAUSSIAN, tmp_path / "killed"), load_teacher(settings().teacher)).source()
    (tmp_path / "killed" / ".pairs-00004.safetensors.9").write_bytes(b"half a draft")
    assert ended(forked(tmp_path / "killed")) == 0
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())  # none was made again
    assert [ended(c) for c in [forked(tmp_path / "two", rank, 2) for rank in (0, 1)]] == [0, 0]
    assert ended(forked(tmp_path / "whole")) == 0
    whole = files_of(tmp_path / "whole")
    assert len(whole) == 5 + 2
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "two") == whole


def test_the_command_makes_pairs_and_says_how_to_learn_from_them(tmp_path, capsys):
    words = ("--count", 4, "--steps", 3, "--solver", "ddim", "--seed", 5)
    code, text, err = called(capsys, "pairs", GAUSSIAN, "--out", tmp_path / "pairs", *words)
    assert code == 0, err
    assert "12 network evaluations" in text and "data.source=pairs" in text
    index = json.loads((tmp_path / "pairs" / "index.json").read_text())
    assert (index["pairs"], index["seed"], index["solver"]) == (4, 5, "ddim")
    given = settings_of(recipe_of("digits/kd", {"count": 7}))  # the rest is the recipe's
    assert (given.count, given.solver, given.steps) == (7, "dpmpp_2m", 12)


# ---- refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "analytic:ring"}, ["data.path", "'analytic:gaussian'", "other weights"]),
        ({"count": 41}, ["data.count", "41", "40"]),
        ({"solver": "ddim"}, ["data.solver", "ddim", "heun"]),
        ({"guidance": 3.0}, ["data.path", "other guidance"]),
    ],
)
def test_other_pairs_than_asked_for_are_refused(tmp_path, change, words):
    made(tmp_path / "pairs", settings())
    change = dict(change)
    tree = recipe(change.pop("source", GAUSSIAN), tmp_path / "pairs").tree()
    tree["teacher"]["guidance"] = change.pop("guidance", 1.0)
    tree["data"] |= change
    asked = Recipe.check(tree)
    teacher = load_teacher(Recipe.check({**tree, "teacher": tree["teacher"]["source"]}).teacher)
    with refused(*words):
        Pairs(asked, teacher).source()


def test_a_folder_with_other_pairs_or_other_files_is_refused_before_work(tmp_path, capsys):
    given = settings()
    made(tmp_path / "pairs", given)
    assert made(tmp_path / "pairs", given)[0]["pairs"] == 40  # again: nothing to do
    with refused("--out*", "steps 6, not 7"):
        made(tmp_path / "pairs", settings(steps=7))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with refused("--out*", "no pairs"):
        made(tmp_path / "notes", given)
    code, _, err = called(capsys, "pairs", GAUSSIAN, "--out", tmp_path / "new", "--solver", "rk4")
    assert code == 2 and "data.solver" in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("ect", {"source": "digits", "count": 5}, ["*data.count", "only pairs"]),
        ("kd", {"source": "pairs", "size": 8}, ["*data.size", "pairs have none"]),
        ("kd", {"source": "digits"}, ["*data.source", "kd", "'pairs'"]),
        ("sid", {"source": "pairs"}, ["*data.source", "sid"]),
    ],
)
def test_keys_that_do_not_go_with_pairs_are_refused(name, data, words):
    tree = recipe("digits").tree()
    with refused(*words):
        Recipe.check({**tree, "objective": {"name": name}, "data": data})


def test_what_the_objective_refuses_is_refused_before_pairs_are_made(pipelines, tmp_path):
    tree = recipe("digits", tmp_path / "pairs", count=64).tree()
    tree["teacher"] = {"source": str(pipelines["edm"]), "null_label": 10}
    tree["objective"] = {"name": "kd", "distance": "lpips"}
    with refused("objective.distance", "set it to huber"):
        build.networks(Recipe.check(tree), tmp_path / "run", False)
    assert not (tmp_path / "pairs").exists()


def test_a_run_with_adapters_learns_from_pairs_made_before_it(pipelines, tmp_path):
    tree = recipe("digits", tmp_path / "pairs", count=16, steps=2).tree()
    tree["teacher"] = {"source": str(pipelines["edm"]), "null_label": 10}
    tree |= {"objective": {"name": "kd"}, "student": {"renoise": False}}
    given = Recipe.check(tree)
    Pairs(given, load_teacher(given.teacher)).source()
    before = files_of(tmp_path / "pairs")
    build.networks(Recipe.check({**tree, "adapters": {"rank": 2}}), tmp_path / "run", False)
    assert files_of(tmp_path / "pairs") == before


def test_a_coupling_does_not_go_with_pairs(tmp_path):
    tree = recipe(GAUSSIAN, tmp_path / "pairs").tree()
    tree["data"]["coupling"] = {"kind": "immiscible"}
    with refused("data.coupling", "remove it"):
        Recipe.check(tree)


def test_inverted_pairs_need_data(tmp_path):
    with refused("data.images"):
        made(tmp_path / "pairs", settings(inverted=2))


# ---- in runs


def test_a_run_makes_its_pairs_counts_them_and_learns_the_same_from_files(pipelines, tmp_path):
    source = pipelines["edm"]
    keys = {"count": 16, "steps": 3, "solver": "dpmpp_2m", "cache": str(tmp_path / "cache")}
    first = build.build(recipe(source, **keys), tmp_path / "a")
    first.engine.train()
    assert first.engine.source.evaluations == 16 * 3
    place = next((tmp_path / "cache" / "pairs").iterdir())
    second = build.build(recipe(source, path=place, in_memory_gb=0.0), tmp_path / "b")
    second.engine.train()
    for a, b in zip(
        first.engine.players["student"].params, second.engine.players["student"].params
    ):
        assert torch.equal(a, b)
    batch, other = (r.engine.source.batch(1, 0, 1, 8) for r in (first, second))
    assert torch.equal(batch.noise, other.noise) and torch.equal(batch.x, other.x)
    index = json.loads((place / "index.json").read_text())
    assert index["conditions"] == {"class_labels": []}
    labels = load_file(place / "pairs-00000.safetensors")["cond.class_labels"]
    assert labels.tolist() == [i % 11 for i in range(16)]


def test_a_budget_counts_the_pairs_before_they_are_made(tmp_path):
    from distill.benchmark.budget import pair_evaluations, steps_for_evaluations

    keys = {"count": 20, "inverted": 3, "images": "digits", "steps": 4}
    asked = recipe("digits", cache=str(tmp_path), **keys)
    before = pair_evaluations(asked)
    assert before == 20 * 7 + 3 * 6  # Heun's
    assert steps_for_evaluations(asked, before + 8 * 5) == 5  # a batch is 8
    assert not list(tmp_path.iterdir())
    assert Pairs(asked, load_teacher(asked.teacher)).source().evaluations == before
    assert pair_evaluations(asked) == before


def test_a_damaged_index_is_refused_and_a_damaged_shard_made_again(tmp_path):
    folder = tmp_path / "pairs"
    before, teacher = made(folder, settings())
    shard = folder / "pairs-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    assert folders.read_index(folder) is None
    assert made(folder, settings())[0] == before and shard.read_bytes() == whole
    for text in ("", "[]", "{}", '{"shards": 3}', '{"shards": []}'):
        (folder / "index.json").write_text(text)
        with refused(f"pairs {folder / 'index.json'}", "damaged"):
            Pairs(recipe(GAUSSIAN, folder), teacher).source()


def test_shards_that_are_not_what_the_index_says_are_made_again(tmp_path):
    """Of fewer pairs, of other shapes, without a tensor, or without what they cost."""
    folder = tmp_path / "pairs"
    before, _ = made(folder, settings())
    shard = folder / "pairs-00000.safetensors"
    whole, tensors = shard.read_bytes(), load_file(shard)
    cost = {"evaluations": "8"}
    for damaged, about in (
        ({k: v[:1] for k, v in tensors.items()}, cost),
        ({**tensors, "x": tensors["x"][:, :1].contiguous()}, cost),
        ({k: v for k, v in tensors.items() if k != "x"}, cost),
        (tensors, None),
    ):
        save_file(damaged, shard, about)
        assert folders.read_index(folder) is None
        assert made(folder, settings())[0] == before and shard.read_bytes() == whole
    for key, value in (("conditions", 3), ("evaluations", "x"), ("shards", []), ("shape", 2)):
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, key: value}))
        with refused("pairs *", "damaged"):
            folders.read_index(folder)
        (folder / "index.json").write_text(json.dumps(index))


def test_a_shard_whose_draft_another_process_removed_is_the_others(tmp_path, monkeypatch):
    made(tmp_path, settings())
    shard = tmp_path / "pairs-00000.safetensors"

    def vanished(*args):
        raise FileNotFoundError("draft")

    monkeypatch.setattr(folders, "save_whole", vanished)
    folders.save(shard, {}, 0)
    with refused(f"pairs {tmp_path / 'other'}", "draft"):
        folders.save(tmp_path / "other", {}, 0)


def test_prompts_that_the_pairs_were_not_made_of_are_refused(tmp_path):
    _, teacher = made(tmp_path, settings("shapes", count=2, steps=1, solver="ddim"))
    Pairs(recipe("shapes", tmp_path), teacher).source()
    with refused("data.prompts", tmp_path):
        Pairs(recipe("shapes", tmp_path, prompts="pack:starter"), teacher).source()
