"""Caches of encoded data: the bits that are without, through kills and damage; whole runs."""

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill.config.recipe import Recipe
from distill.config.schema import Bucketing
from distill.data import cache, encode, from_recipe
from distill.data.cache import DIGESTS, Cache, Cached, _Digests
from distill.data.fingerprint import fingerprint
from distill.data.listing import REPORT
from distill.data.pictures import sizes_of
from distill.data.prompts import list_prompts
from distill.training import build
from tests.helpers.command_line import called
from tests.helpers.datasets import folder_of, picture, recipe, same, spoil, toy
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree


def work(teacher=None, **data):
    made = from_recipe.encoding_job(recipe(**data), teacher or toy())
    assert made is not None
    return made


@pytest.fixture
def small(monkeypatch):
    """Shards of one group of items, so that a few items make several."""
    monkeypatch.setattr(cache, "SHARD_ITEMS", encode.TOGETHER)


@pytest.mark.parametrize("more", [{}, {"buckets": {"multiple": 2}}])
def test_cached_data_are_the_bits_of_data_in_memory(tmp_path, small, more):
    folder_of(tmp_path / "a", 50)
    folder_of(tmp_path / "a/wide", 20, size=(8, 16))
    data = {"source": str(tmp_path / "a"), "cache": str(tmp_path / "c"), **more}
    held = from_recipe.source_of(recipe(**data), toy())
    cached = from_recipe.source_of(recipe(**data, in_memory_gb=0), toy())
    assert len(list((tmp_path / "c").glob("*/shard-*"))) >= 5
    same(cached, held)
    again = from_recipe.source_of(recipe(**data), toy())  # it is there now, and so it is read
    assert again.x is None
    same(again, held)


def test_a_cache_of_prompts_is_the_same_bits_and_holds_the_null_prompt(tmp_path, small):
    (tmp_path / "p.txt").write_text("".join(f"{i} words\n" for i in range(40)))
    data = {"prompts": str(tmp_path / "p.txt"), "cache": str(tmp_path / "c")}
    teacher = toy("blurry")
    held = from_recipe.source_of(recipe("sid", **data), teacher)
    same(from_recipe.source_of(recipe("sid", **data, in_memory_gb=0), teacher), held)
    made = from_recipe.encoding_job(recipe("sid", **data), teacher)
    null = Cache(made, tmp_path / "c").null()
    want = teacher.codec.condition(["blurry"])
    assert null.keys() == want.keys()
    assert all(torch.equal(v, want[k]) for k, v in null.items())


def test_a_ready_cache_is_read_without_the_encoders(tmp_path, monkeypatch):
    folder_of(tmp_path / "a", 40)
    data = {"source": str(tmp_path / "a"), "cache": str(tmp_path / "c"), "in_memory_gb": 0}
    first = from_recipe.source_of(recipe(**data), toy())
    monkeypatch.setattr(encode.EncodingJob, "encode", lambda *_: pytest.fail("it encoded again"))
    same(from_recipe.source_of(recipe(**data), toy()), first)


def forked(folder, root, rank=0, world=1, pause=0.0):
    """A process that builds the folder's cache under `root`, a pause before each group of items."""
    if child := os.fork():
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        at_once, cache.SHARD_ITEMS = encode.EncodingJob.encode, encode.TOGETHER

        def later(self, items):
            time.sleep(pause)
            return at_once(self, items)

        encode.EncodingJob.encode = later
        data = {"source": str(folder), "cache": str(root), "in_memory_gb": 0, "skip_share": 0.1}
        from_recipe.source_of(recipe(**data), toy())
        code = 0
    finally:
        os._exit(code)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def files_of(root):
    return {p.name: p.read_bytes() for p in next(root.glob("*/")).iterdir()}


def test_a_killed_build_goes_on_to_the_same_bytes(tmp_path):
    a = folder_of(tmp_path / "a", 200)
    (a / "150.png").write_bytes(b"no image")
    spoil(a, "corrupt image")

    killed = forked(a, tmp_path / "killed", pause=0.1)
    until = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("*/shard-*"))) < 3:
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(killed, signal.SIGKILL)
    assert ended(killed) == -signal.SIGKILL
    half = next((tmp_path / "killed").glob("*/"))
    before = {p: p.stat().st_mtime_ns for p in half.glob("shard-*")}
    assert 3 <= len(before) < 13
    assert not (half / "index.json").exists()
    assert ended(forked(a, tmp_path / "killed")) == 0
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())  # none was made again
    assert ended(forked(a, tmp_path / "whole")) == 0
    killed, whole = files_of(tmp_path / "killed"), files_of(tmp_path / "whole")
    assert len(whole) == 13 + 3
    assert killed == whole


def test_a_damaged_shard_is_named_and_a_deleted_one_made_again(tmp_path, small):
    folder_of(tmp_path / "a", 40)
    data = {"source": str(tmp_path / "a"), "cache": str(tmp_path / "c"), "in_memory_gb": 0}
    first = from_recipe.source_of(recipe(**data), toy())
    victim = next((tmp_path / "c").glob("*/shard-00001*"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-9])
    with refused("data.cache", "shard-00001.safetensors"):
        from_recipe.source_of(recipe(**data), toy())
    victim.unlink()
    same(from_recipe.source_of(recipe(**data), toy()), first)
    assert victim.read_bytes() == whole


def key(teacher=None, root="c", **data):
    return Cache(work(teacher, **data), Path(root)).folder.name


def test_the_key_is_of_the_encoder_the_items_and_their_cut(tmp_path):
    a = folder_of(tmp_path / "a")
    data = {"source": str(a)}
    keys = [key(**data)]

    def weights(teacher):
        with torch.no_grad():
            teacher.codec.down.weight[0, 0, 0, 0] += 1e-3

    def text(teacher):
        with torch.no_grad():
            teacher.codec.words.mix.bias[0] += 1e-3

    def half(teacher):
        teacher.codec.words.bfloat16().float()

    for change in (weights, text, half):
        teacher = toy()
        change(teacher)
        keys.append(key(teacher, **data))
    keys.append(key(toy("ugly"), **data))
    other = toy()
    other.source = "another"
    keys.append(key(other, **data))
    keys.append(key(**data, captions="folder"))
    keys.append(key(**data, buckets={"multiple": 2}))
    (a / "003.txt").write_text("another word")
    keys.append(key(**data))
    picture(99).save(a / "003.png")
    keys.append(key(**data))
    assert len(set(keys)) == len(keys)


def test_the_key_is_not_of_what_does_not_matter(tmp_path):
    a = folder_of(tmp_path / "a")
    shutil.copytree(a, tmp_path / "b")
    used = toy()
    used.codec.null  # noqa: B018  (it is kept once made)
    from_recipe.source_of(recipe(source=str(a)), used)
    with torch.no_grad():
        used.denoiser.layer.weight += 1
    os.utime(a / "003.png")
    keys = {key(toy(), source=str(a)), key(used, source=str(a)),
            key(source=str(tmp_path / "b")), key(source=str(a), skip_share=0.5)}  # fmt: skip
    assert len(keys) == 1


def test_tokenizers_count_and_their_use_does_not(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def teacher(words):
        made = toy()
        inner = Tokenizer(models.WordLevel(dict(zip(words, range(9))), unk_token="?"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        made.codec.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="?")
        return made

    one = teacher(["?", "a", "b"])
    before = fingerprint(one)
    one.codec.tokenizer(["a b"], padding="max_length", max_length=4, truncation=True)
    assert fingerprint(one) == before
    assert fingerprint(teacher(["?", "b", "a"])) != before


def test_a_cache_over_its_limit_is_refused_and_nothing_is_written(tmp_path):
    folder_of(tmp_path / "a")
    data = {"source": str(tmp_path / "a"), "in_memory_gb": 0}
    need = work(**data).bytes
    assert need == 20 * 4 * (4 * 4 * 4 + 6 * 8 + 8)
    with refused("data.cache_limit_gb", "20"):
        from_recipe.source_of(
            recipe(**data, cache=str(tmp_path / "c"), cache_limit_gb=need * 0.99 / 1e9), toy()
        )
    with refused("data.cache", "folder"):
        from_recipe.source_of(recipe(**data, cache=str(tmp_path / "a/001.png/c")), toy())
    assert {p.name for p in tmp_path.iterdir()} == {"a"}
    from_recipe.source_of(
        recipe(**data, cache=str(tmp_path / "c"), cache_limit_gb=need / 1e9), toy()
    )


def test_a_codec_whose_conditions_vary_in_length_is_named(tmp_path):
    (tmp_path / "p.txt").write_text("one\n" * 20 + "a longer one\n" * 20)
    teacher = toy()
    teacher.codec.condition = lambda prompts: {"text": torch.zeros(len(prompts), len(prompts[-1]))}
    with refused("teacher 'toy'", "cond.text"):
        from_recipe.source_of(recipe("sid", prompts=str(tmp_path / "p.txt")), teacher)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_cache_is_not_read_into_memory(tmp_path):
    files = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for k, file in enumerate(files):
        save_file({"x": torch.full((64, 1 << 18), float(k))}, file)  # 64 MiB

    def private():
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(v for v in lines if v.startswith("RssAnon")).split()[1]) / 1024

    source = Cached(files, ["x"], (1,), 0)
    before = private()
    total = sum(source.batch(d, 0, 1, 4).data.mean().item() for d in range(32))
    assert total == 16  # half of the items are ones, and each came once
    assert private() - before < 40


def test_a_data_size_that_is_not_the_teachers_is_refused(tmp_path):
    folder_of(tmp_path / "a")
    with refused("data.source", "4", "8"):
        from_recipe.source_of(recipe(source=str(tmp_path / "a"), size=16), toy())
    with refused("data.size", "9", "2"):
        from_recipe.source_of(recipe(source=str(tmp_path / "a"), size=9), toy())
    with refused("data.buckets.multiple", "3", "2"):
        from_recipe.source_of(recipe(source=str(tmp_path / "a"), buckets={"multiple": 3}), toy())


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"prompts": 5}, ("data.prompts", "5")),
        ({"prompts": {"hf": "a", "colum": "b"}}, ("data.prompts.colum", "unknown")),
        ({"prompts": {"hf": "a"}}, ("data.prompts.column",)),
        ({"source": "x", "prompts": "y"}, ("data.prompts", "data.source")),
        ({"buckets": {}}, ("data.buckets", "images")),
        ({"source": "x", "buckets": {"ratio": 0.5}}, ("data.buckets.ratio", "1", "0.5")),
        ({"source": "x", "buckets": {"ratio": 1e300}}, ("data.buckets.ratio", "100", "300")),
        ({"prompts": ""}, ("data.prompts", "remove")),
        ({"source": ""}, ("data.source", "remove")),
        ({"source": "x", "captions": ""}, ("data.captions", "empty")),
        ({"cache": ""}, ("data.cache", "remove")),
        ({"prompts": {"hf": "", "column": "a"}}, ("data.prompts.hf", "empty")),
        ({"source": {"hf": "a", "column": ""}}, ("data.source.column", "empty")),
        ({"skip_share": 1.5}, ("data.skip_share", "1")),
        ({"promts": "x"}, ("data.promts", "prompts")),
    ],
)
def test_a_data_section_is_checked_key_by_key(data, line):
    with refused(*line):
        recipe("sid", **data)


def test_sides_that_are_too_many_to_try_are_refused():
    many = Bucketing(multiple=1, ratio=100)
    with refused("data.buckets.multiple", "10,000"):
        sizes_of(many, 10**9, 10**9)
    assert max(sizes_of(many, 8, 8)) == (80, 1)


@pytest.mark.parametrize("content", ["[]", "3", "[" * 100_000, '{"%s": 3}', '{"%s": [3, 1]}'])
def test_digests_of_another_form_are_made_again(tmp_path, content):
    file = tmp_path / "words.txt"
    file.write_text("one\n")
    want = [hashlib.blake2b(b"one\n", digest_size=16).hexdigest()]
    (tmp_path / DIGESTS).write_text(content.replace("%s", str(file)))
    digests = _Digests(tmp_path)
    assert digests([file]) == want
    digests.save()
    tree = json.loads((tmp_path / DIGESTS).read_text())
    assert [entry[2] for entry in tree.values()] == want


def test_a_recipe_with_a_column_reads_back_as_itself():
    made = recipe("sid", prompts={"hf": "someone/something", "column": "text"})
    assert Recipe.check(made.tree()) == made


# ---- whole runs


@pytest.fixture
def classes(tmp_path):
    """120 pictures in ten class folders."""
    for label in range(10):
        folder_of(tmp_path / f"a/{label}", 12, captioned=False)
    return tmp_path / "a"


def run_tree(pipelines, tmp_path, source, **data):
    tree = recipe_tree("consistency", pipelines["edm"])
    tree["data"] = {"source": str(source), "cache": str(tmp_path / "c"), **data}
    return tree


def params(engine):
    return [p.detach().clone() for p in engine.players["student"].params]


def test_a_cached_run_equals_an_uncached_one(pipelines, tmp_path, classes):
    engines = []
    for name, memory in (("held", 4.0), ("cached", 0.0)):
        tree = run_tree(pipelines, tmp_path, classes, in_memory_gb=memory)
        engine = build.build(Recipe.check(tree), tmp_path / name).engine
        assert isinstance(engine.source, Cached) == (name == "cached")
        engine.train()
        engines.append(engine)
        assert json.loads((tmp_path / name / REPORT).read_text())["items"] == 120
    for a, b in zip(*map(params, engines), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_a_cached_run_resumes_at_its_place_and_may_change_where_data_lie(
    pipelines, tmp_path, classes
):
    tree = run_tree(pipelines, tmp_path, classes, in_memory_gb=0.0)
    whole = build.build(Recipe.check(tree), tmp_path / "whole").engine
    whole.train()
    tree["train"]["steps"] = 2
    build.build(Recipe.check(tree), tmp_path / "half").engine.train()
    tree["train"]["steps"] = 4
    tree["data"] |= {"cache": str(tmp_path / "elsewhere"), "in_memory_gb": 4.0}
    resumed = build.build(Recipe.check(tree), tmp_path / "half", resume=True).engine
    resumed.train()
    assert all(torch.equal(a, b) for a, b in zip(params(whole), params(resumed), strict=True))


def test_the_command_says_the_size_builds_once_and_names_what_it_skipped(
    pipelines, tmp_path, classes, capsys
):
    import yaml

    (classes / "3/007.png").write_bytes(b"no image")
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(run_tree(pipelines, tmp_path, classes)))
    code, out, err = called(capsys, "cache", path)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].startswith("120 items, 3.17e-05 GB")  # 8 · 8 floats and a label of 8 bytes
    assert lines[1].startswith(f"encoding into {tmp_path / 'c'}")
    assert lines[-1].startswith("119 items cached; 1 skipped (1 corrupt image)")
    code, out, _ = called(capsys, "cache", path)
    assert code == 0 and "already cached in" in out
    code, _, err = called(capsys, "cache", path, "data.skip_share=0")
    assert code == 2
    assert "corrupt image" in err and "3/007.png" in err and err.count("\n") == 1
    code, _, err = called(capsys, "cache", path, "data.source=digits")
    assert code == 2 and "need no cache" in err


def test_two_processes_build_one_cache_between_them(tmp_path):
    a = folder_of(tmp_path / "a", 100)
    children = [forked(a, tmp_path / "two", rank, 2) for rank in range(2)]
    assert [ended(c) for c in children] == [0, 0]
    assert ended(forked(a, tmp_path / "one")) == 0
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_a_control_character_in_a_prompt_is_a_bad_item(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a fox\n\0a crow\na\tstork\n")
    listing = list_prompts(str(file))
    assert [i.prompt for i in listing.items] == ["a fox", "a\tstork"]
    assert [(b.kind, b.name) for b in listing.bad] == [("control character", f"{file}:2")]


def test_a_folder_of_prompts_is_answered_with_the_remedy(tmp_path):
    with refused("data.prompts", "folder"):
        list_prompts(str(tmp_path))
