"""Data: prompts, folders, shards and tables; what is skipped."""

import csv
import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tf

from distill.config.schema import Bucketing, Column
from distill.data import from_recipe
from distill.data.encode import bucket_seed
from distill.data.images import list_images
from distill.data.listing import REPORT
from distill.data.pictures import into_buckets, sizes_of
from distill.data.prompts import list_prompts, pack
from distill.data.stream import Buckets, Source
from tests.helpers.datasets import (
    folder_of,
    picture,
    pixels,
    png,
    recipe,
    same,
    spoil,
    tar_of,
    toy,
)
from tests.helpers.refusals import refused

# ---- buckets


def buckets(sizes=(5, 9, 16)):
    parts, first = [], 0
    for k, n in enumerate(sizes):
        x = torch.arange(first, first + n).float()[:, None].expand(n, k + 1)
        parts.append(Source((k + 1,), x.clone(), None, k, n))
        first += n
    return Buckets(parts, 0)


def test_a_batch_has_the_shape_of_one_bucket_on_all_its_shards():
    source = buckets()
    for draw in range(60):
        shapes = {source.batch(draw, shard, 2, 3).data.shape for shard in range(2)}
        assert len(shapes) == 1
        batch = source.batch(draw, 0, 2, 3)
        assert batch.noise.shape == batch.data.shape


def test_over_as_many_batches_as_items_every_item_comes_as_often_as_a_batch_is_large():
    source = buckets()
    for start in (0, 30):
        seen = [source.batch(start + d, 0, 1, 4).data[:, 0] for d in range(30)]
        assert torch.bincount(torch.cat(seen).long()).tolist() == [4] * 30


def test_no_two_batches_of_buckets_share_their_noise():
    source = buckets()
    noises = [source.batch(d, k, 2, 2).noise[0, 0].item() for d in range(90) for k in range(2)]
    assert len(set(noises)) == 180


def test_every_bucket_has_a_seed_of_its_own_and_the_first_has_the_runs():
    assert bucket_seed(5, 0) == 5
    assert len({bucket_seed(s, b) for s in (5, 6) for b in range(4)}) == 8


def test_within_a_bucket_every_epoch_visits_every_item_once():
    source = buckets((6, 10))
    batches = [source.batch(d, 0, 1, 2).data for d in range(32)]
    for width, n, first in ((1, 6, 0), (2, 10, 6)):
        mine = torch.cat([b[:, 0] for b in batches if b.shape[1] == width]).long().tolist()
        epochs = [sorted(mine[i : i + n]) for i in range(0, len(mine) - n + 1, n)]
        assert len(epochs) >= 2
        assert all(e == list(range(first, first + n)) for e in epochs)


def test_buckets_take_turns_in_proportion_and_not_in_long_runs():
    source = buckets((10, 30))
    kinds = [source.batch(d, 0, 1, 4).data.shape[1] for d in range(40)]
    for start in range(0, 40, 8):
        assert 1 <= kinds[start : start + 8].count(1) <= 3  # two on average


@pytest.mark.parametrize("make", [buckets, lambda: buckets((20,)).parts[0]])
def test_two_shards_hold_what_one_twice_as_large_does(make):
    source = make()
    for draw in range(40):
        two = torch.cat([source.batch(draw, k, 2, 3).data for k in range(2)])
        assert torch.equal(two, source.batch(draw, 0, 1, 6).data)


def test_buckets_are_of_one_area_and_within_the_ratio():
    sizes = sizes_of(Bucketing(multiple=64, ratio=2.0), 1024, 1024)
    assert (1024, 1024) in sizes and (1344, 768) in sizes and (768, 1344) in sizes
    for h, w in sizes:
        assert h % 64 == w % 64 == 0
        assert abs(h * w / 1024**2 - 1) < 0.05
        assert max(h, w) / min(h, w) <= 2
    assert sizes_of(None, 512, 512) == [(512, 512)]


def test_images_go_to_the_bucket_nearest_in_shape_and_keep_their_captions(tmp_path):
    folder_of(tmp_path / "a/tall", 6, size=(40, 20))
    folder_of(tmp_path / "a/wide", 10, size=(20, 40))
    r = recipe(source=str(tmp_path / "a"), buckets={"multiple": 2}, captions="folder")
    source = from_recipe.source_of(r, toy())
    text = {k: toy().codec.condition([k])["pooled"] for k in ("tall", "wide")}
    shapes = set()
    for draw in range(16):
        batch = source.batch(draw, 0, 1, 2)
        h, w = batch.data.shape[2:]
        shapes.add((h, w))
        want = text["tall" if h > w else "wide"].expand(2, -1)
        torch.testing.assert_close(batch.cond["pooled"], want)
    assert shapes == {(5, 3), (3, 5)}


def test_images_between_two_buckets_go_to_the_nearer_by_ratio(tmp_path):
    """11×10 is 2.2 times as tall as a bucket of 1:2, and a bucket of 2:1 is 1.8 times as tall."""
    for i, size in enumerate([(11, 10), (10, 11), (30, 10)]):
        folder_of(tmp_path / f"a/{i}", 1, captioned=False, size=size)
    listing = list_images(str(tmp_path / "a"), None, 0, False)
    into_buckets(listing, [(4, 8), (8, 4)])
    assert [i.bucket for i in listing.items] == [1, 0, 1]


# ---- prompts


def test_the_starter_pack_is_varied_and_whole():
    lines = pack("starter").read_text().splitlines()
    assert len(lines) >= 300
    assert len({line.lower() for line in lines}) == len(lines)
    assert all(4 <= len(line.split()) <= 25 and line == line.strip() for line in lines)
    assert len({w for line in lines for w in line.split()}) > 1000
    assert [i.prompt for i in list_prompts("pack:starter").items] == lines


def test_a_teacher_that_reads_text_gets_the_pack_by_default():
    assert from_recipe.source_of(recipe("sid"), toy()).size == len(
        pack("starter").read_text().splitlines()
    )


def test_prompts_come_from_lines_and_from_columns(tmp_path):
    words = ["one", "two, three", "four"]
    (tmp_path / "p.txt").write_text("one\n two, three \nfour\n\n\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"text": w}) + "\n" for w in words))
    (tmp_path / "p.json").write_text(json.dumps([{"text": w} for w in words]))
    with (tmp_path / "p.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["id", "text"], *enumerate(words)])
    for name in ("p.txt", "p.jsonl:text", "p.json:text", "p.csv:text"):
        listing = list_prompts(str(tmp_path / name))
        assert [i.prompt for i in listing.items] == words
        assert not listing.bad
    column = Column(hf=str(tmp_path / "p.csv"), column="text")
    assert [i.prompt for i in list_prompts(column).items] == words


def test_prompts_of_datasets_and_parquet_files_are_read_without_the_hub(tmp_path):
    datasets = pytest.importorskip("datasets")
    words = [f"word {i}" for i in range(25)]
    data = datasets.Dataset.from_dict({"text": words, "id": list(range(25))})
    data.to_parquet(tmp_path / "p.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([3])}).save_to_disk(tmp_path / "both")
    for name in ("p.parquet", "saved", "both"):
        listing = list_prompts(f"{tmp_path / name}:text")
        assert [i.prompt for i in listing.items] == words
    test = Column(hf=str(tmp_path / "both"), column="text", split="test")
    assert [i.prompt for i in list_prompts(test).items] == ["word 3"]
    with refused("data.prompts", "'tset'", "'test'"):
        list_prompts(test.model_copy(update={"split": "tset"}))
    with refused("data.prompts", "'txt'", "'text'"):
        list_prompts(f"{tmp_path / 'saved'}:txt")


def test_images_of_datasets_and_parquet_files_equal_those_of_the_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = folder_of(tmp_path / "a")
    files = sorted(map(str, folder.glob("*.png")))
    rows = {"image": files, "caption": [f"word {i}" for i in range(20)]}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "saved")
    inside = [{"bytes": Path(f).read_bytes(), "path": None} for f in files]
    datasets.Dataset.from_dict({**rows, "image": inside}).to_parquet(
        tmp_path / "p.parquet", batch_size=7
    )
    want = from_recipe.source_of(recipe(source=str(folder)), toy())
    for name in ("saved", "p.parquet"):
        place = f"{tmp_path / name}:image"
        same(from_recipe.source_of(recipe(source=place, captions="caption"), toy()), want)


def test_without_the_package_a_dataset_is_refused_in_one_line(tmp_path, monkeypatch):
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    for place in ("someone/something:text", f"{tmp_path / 'p.parquet'}:text"):
        with refused("data.prompts", "fewstep[data]"):
            list_prompts(place)


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("nowhere.txt", ("'nowhere.txt'", "pack:starter")),
        ("pack:startr", ("'startr'", "'starter'")),
        ("nowhere.csv:text", ("nowhere.csv:text", ": nowhere.csv")),
        ("./p.csv", ("'./p.csv:COLUMN'",)),
        ("./p.csv:txt", ("'txt'", "'text'")),
        ("./bad.jsonl:text", ("bad.jsonl", "line 1")),
        ("./list.json:text", ("list.json", "JSON objects")),
        ("./latin.txt", ("byte 2 is 0xf6", "UTF-8")),
        ("./empty.txt", ("'./empty.txt'", "no prompts")),
    ],
)
def test_prompts_that_are_not_there_are_refused_by_name(tmp_path, monkeypatch, place, values):
    monkeypatch.chdir(tmp_path)  # messages cut long paths
    (tmp_path / "p.csv").write_text("text\nhello\n")
    (tmp_path / "bad.jsonl").write_text('{"text": \n')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "latin.txt").write_bytes("Köln".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with refused("data.prompts", *values):
        list_prompts(place)


def test_prompts_alone_give_batches_without_data(tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"{i} words\n" for i in range(40)))
    source = from_recipe.source_of(recipe("sid", prompts=str(tmp_path / "p.txt")), toy())
    assert source.size == 40
    batch = source.batch(3, 1, 2, 5)
    assert batch.x is None and batch.noise.shape == (5, 4, 4, 4)
    assert batch.cond["text"].shape == (5, 6, 8)
    everything = torch.cat([source.batch(d, 0, 1, 8).cond["text"].flatten(1) for d in range(5)])
    want = toy().codec.condition([f"{i} words" for i in range(40)])["text"].flatten(1)
    gaps = torch.cdist(want, everything, compute_mode="donot_use_mm_for_euclid_dist")
    assert gaps.argmin(1).sort().values.tolist() == list(range(40))  # each once
    assert gaps.min(1).values.max() < 1e-6


def test_prompts_for_a_teacher_that_takes_none_are_refused():
    with refused("data.prompts", "pixels"):
        from_recipe.source_of(recipe("sid", prompts="pack:starter"), pixels())
    with refused("data.prompts", "10"):
        from_recipe.source_of(recipe("sid", prompts="pack:starter"), pixels(10))


# ---- images


def test_a_class_folder_in_memory_is_bit_for_bit_what_it_always_was(tmp_path):
    for name in ("ant", "bee"):
        folder_of(tmp_path / "a" / name, 12, captioned=False)
    source = from_recipe.source_of(recipe(source=str(tmp_path / "a")), pixels(3))
    images = []
    for path in sorted((tmp_path / "a").rglob("*.png")):
        image = tf.resize(Image.open(path).convert("RGB"), [8, round(11 * 8 / 9)], antialias=True)
        images.append(tf.pil_to_tensor(tf.center_crop(image, [8, 8])))
    labels = {"class_labels": torch.tensor([0] * 12 + [1] * 12)}
    same(source, Source((3, 8, 8), torch.stack(images).float() / 127.5 - 1, labels, 0, 24))
    assert source.x.min() >= -1 and source.x.max() <= 1


def test_captions_come_from_beside_the_image(tmp_path):
    a = folder_of(tmp_path / "a", 3)
    (a / "000.txt").unlink()
    (a / "000.json").write_text(json.dumps({"caption": "from json", "title": "a title"}))
    (a / "001.json").write_text(json.dumps({"title": "another"}))
    captions = [i.prompt for i in list_images(str(a), None, 0, True).items]
    assert captions == ["from json", "word 1", "word 2"]
    listing = list_images(str(a), "json:title", 0, True)
    assert [i.prompt for i in listing.items] == ["a title", "another"]
    assert [b.kind for b in listing.bad] == ["empty caption"]
    assert {i.prompt for i in list_images(str(a), "folder", 0, True).items} == {"a"}
    with refused("data.captions", "'jsn'", "'txt'", "json:KEY"):
        list_images(str(a), "jsn", 0, True)


def test_shards_hold_what_the_folder_holds(tmp_path):
    a = folder_of(tmp_path / "a")
    samples = [(p.name, p.read_bytes()) for p in sorted(a.iterdir())]
    for k in range(4):
        tar_of(tmp_path / f"s-{k:02d}.tar", samples[k * 10 : k * 10 + 10])
    want = from_recipe.source_of(recipe(source=str(a)), toy())
    for place in ("s-{00..03}.tar", "s-*.tar"):
        same(from_recipe.source_of(recipe(source=str(tmp_path / place)), toy()), want)
    with refused("data.source", "s-04.tar"):
        list_images(str(tmp_path / "s-{00..04}.tar"), None, 0, True)


def test_labels_of_shards_are_their_cls_members(tmp_path):
    tar_of(tmp_path / "s.tar", [("x/1.cls", b"2"), ("x/1.png", png(1)), ("x/2.png", png(2)),
                                ("x/2.cls", b"0\n")])  # fmt: skip
    items = list_images(str(tmp_path / "s.tar"), None, 3, False).items
    assert [i.prompt for i in items] == ["2", "0"]
    assert items[1].image() == png(2)
    with refused("data.source", "s.tar/x/1", "'2'"):
        from_recipe.source_of(recipe(source=str(tmp_path / "s.tar")), pixels(2))


def test_a_photograph_that_lies_on_its_side_is_turned(tmp_path):
    tmp_path.joinpath("a").mkdir()
    upright = Image.fromarray(
        np.tile(np.linspace(0, 255, 16)[:, None, None], (1, 8, 3)).astype("u1")
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(tmp_path / "a/1.png", exif=exif)
    upright.save(tmp_path / "a/2.png")
    source = from_recipe.source_of(recipe(source=str(tmp_path / "a")), pixels())
    assert torch.equal(source.x[0], source.x[1])


@pytest.mark.parametrize(("h", "w", "box"), [(8, 14, (3, 0, 11, 8)), (15, 8, (0, 4, 8, 12))])
def test_a_picture_is_cut_at_its_centre_and_not_stretched(tmp_path, h, w, box):
    """Of the side that the teacher takes, so that nothing is resized: pixels are the file's."""
    folder_of(tmp_path / "a", 3, captioned=False, size=(h, w))
    source = from_recipe.source_of(recipe(source=str(tmp_path / "a")), pixels())
    for i, got in enumerate(source.x):
        want = np.asarray(picture(i, (h, w)).crop(box))
        assert np.array_equal(((got + 1) * 127.5).round().permute(1, 2, 0).numpy(), want)


# ---- what is bad


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """200 captioned images in a folder, and in a tar file."""
    root = tmp_path_factory.mktemp("good")
    a = folder_of(root / "a", 200)
    tar_of(root / "a.tar", [(p.name, p.read_bytes()) for p in sorted(a.iterdir())])
    return root


KINDS = ["corrupt image", "empty caption", "truncated shard"]


@pytest.mark.parametrize("memory", [4.0, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_bad_is_counted_named_and_skipped(good, tmp_path, kind, memory):
    shutil.copytree(good, tmp_path / "d")
    place = tmp_path / ("d/a.tar" if kind == "truncated shard" else "d/a")
    name = spoil(place, kind)
    data = {"source": str(place), "cache": str(tmp_path / "c"), "in_memory_gb": memory}
    source = from_recipe.source_of(recipe(**data), toy())
    assert source.report["by_kind"] == {kind: 1}
    assert source.report["skipped"] == 1
    assert source.report["items"] == 200
    assert source.report["files"][0]["name"] == name
    assert source.size == 199
    seen = torch.cat([source.batch(d, 0, 1, 199).data for d in range(1)])
    assert len(seen.flatten(1).unique(dim=0)) == 199
    if memory == 0:
        report = json.loads(next((tmp_path / "c").glob(f"*/{REPORT}")).read_text())
        assert report == source.report


@pytest.mark.parametrize("memory", [4.0, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_more_bad_than_allowed_stops_at_the_first_by_name(good, tmp_path, kind, memory):
    shutil.copytree(good, tmp_path / "d")
    place = tmp_path / ("d/a.tar" if kind == "truncated shard" else "d/a")
    name = spoil(place, kind)
    data = {"source": str(place), "cache": str(tmp_path / "c"), "in_memory_gb": memory}
    named = f"{place.name}': {kind}: {name}: "  # messages shorten long paths
    with refused("data.source", named, "1 of 200", "data.skip_share = 0.001"):
        from_recipe.source_of(recipe(**data, skip_share=0.001), toy())


def test_a_shard_cut_between_two_members_is_truncated_too(tmp_path):
    path = tar_of(tmp_path / "s.tar", [(f"{i}.png", png(i)) for i in range(5)])
    with tarfile.open(path) as tar:
        fourth = tar.getmembers()[3]
    path.write_bytes(path.read_bytes()[: fourth.offset])
    listing = list_images(str(path), None, 0, False)
    assert len(listing.items) == 3
    assert listing.bad[0].kind == "truncated shard"
    assert "no end-of-archive mark after 3 samples" in listing.bad[0].reason


def test_a_blank_line_among_prompts_is_named_by_its_number(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\nthree\n")
    place = str(tmp_path / "p.txt")
    assert [b.name for b in list_prompts(place).bad] == [f"{place}:2"]
    with refused("data.prompts", "p.txt:2"):
        from_recipe.source_of(recipe("sid", prompts=place), toy())
