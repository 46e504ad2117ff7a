"""Data: prompts, folders, shards and tables; what is skipped; caches that are the same bits."""

import csv
import io
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import functional as tf

from distill import __main__ as cli
from distill import build, cache, encode, sources
from distill.cache import Cache, Cached
from distill.data import Buckets, Source
from distill.fingerprint import fingerprint
from distill.images import list_images, sizes_of
from distill.listing import REPORT
from distill.prompts import list_prompts, pack
from distill.recipe import Recipe
from distill.sections import Bucketing, Column
from teachers import UserError
from teachers.denoiser import Denoiser
from teachers.process import Karras
from teachers.teacher import Pixels, Teacher
from tests.toys import recipe_tree


class Words(nn.Module):
    """A text encoder: each letter an embedding, six of them, mixed by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.mix = nn.Embedding(128, 8), nn.Linear(8, 8)

    def forward(self, prompts):
        codes = [[ord(c) % 128 for c in p.ljust(6)[:6]] for p in prompts]
        return self.mix(self.letters(torch.tensor(codes))).tanh()


class Toy:
    """A text-to-image codec: letters in, and a convolution that halves each side."""

    def __init__(self, negative: str = "") -> None:
        torch.manual_seed(3)
        self.words, self.negative, self._null = Words(), negative, None
        self.down, self.up = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 3, 2, 2)

    @property
    def null(self):
        if self._null is None:
            self._null = self.condition([self.negative])
        return self._null

    @torch.no_grad()
    def condition(self, prompts):
        text = self.words([str(p) for p in prompts])
        return {"text": text, "pooled": text.mean(1)}

    @torch.no_grad()
    def encode(self, images):
        return self.down(images)

    @torch.no_grad()
    def decode(self, latents):
        return self.up(latents)


class Nothing(Denoiser):
    """Stands for a network: no weights that a codec's fingerprint may see."""

    def __init__(self) -> None:
        super().__init__()
        self.process, self.layer = Karras(), nn.Linear(2, 2)


def toy(negative=""):
    return Teacher(Nothing(), Toy(negative), (4, 4, 4), "toy")  # pictures of 3×8×8


def pixels(classes=0):
    return Teacher(Nothing(), Pixels(classes), (3, 8, 8), "pixels")


def recipe(objective="consistency", **data):
    tree = {
        "teacher": "digits",
        "objective": {"name": objective},
        "data": {"cache": "/nowhere/at/all", **data},
        "train": {"steps": 10, "batch": 8},
    }
    return Recipe.check(tree)


def picture(i, size=(9, 11)):
    """An image whose pixels say which it is."""
    rng = np.random.default_rng(i)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def folder_of(path, n=20, captioned=True, size=(9, 11)):
    path.mkdir(parents=True)
    for i in range(n):
        picture(i, size).save(path / f"{i:03d}.png")
        if captioned:
            (path / f"{i:03d}.txt").write_text(f"word {i}\n")
    return path


def png(i):
    file = io.BytesIO()
    picture(i).save(file, "png")
    return file.getvalue()


def tar_of(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def same(a, b):
    """Whether two sources give the same bits, in batches of two shards."""
    assert a.size == b.size
    for draw in range(2 * a.size):
        one, two = a.batch(draw, draw % 2, 2, 3), b.batch(draw, draw % 2, 2, 3)
        assert torch.equal(one.noise, two.noise)
        assert (one.x is None) == (two.x is None)
        assert one.x is None or torch.equal(one.x, two.x)
        assert one.cond.keys() == two.cond.keys()
        assert all(torch.equal(v, two.cond[k]) for k, v in one.cond.items())


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
    source = sources.source_of(r, toy())
    text = {k: toy().codec.condition([k])["pooled"] for k in ("tall", "wide")}
    shapes = set()
    for draw in range(16):
        batch = source.batch(draw, 0, 1, 2)
        h, w = batch.data.shape[2:]
        shapes.add((h, w))
        want = text["tall" if h > w else "wide"].expand(2, -1)
        torch.testing.assert_close(batch.cond["pooled"], want)
    assert shapes == {(5, 3), (3, 5)}


# ---- prompts


def test_the_starter_pack_is_varied_and_whole():
    lines = pack("starter").read_text().splitlines()
    assert len(lines) >= 300
    assert len({line.lower() for line in lines}) == len(lines)
    assert all(4 <= len(line.split()) <= 25 and line == line.strip() for line in lines)
    assert len({w for line in lines for w in line.split()}) > 1000
    assert [i.prompt for i in list_prompts("pack:starter").items] == lines


def test_a_teacher_that_reads_text_gets_the_pack_by_default():
    assert sources.source_of(recipe("sid"), toy()).size == len(
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
    with pytest.raises(UserError, match="no split 'tset'; did you mean 'test'"):
        list_prompts(test.model_copy(update={"split": "tset"}))
    with pytest.raises(UserError, match="no column 'txt'; did you mean 'text'"):
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
    want = sources.source_of(recipe(source=str(folder)), toy())
    for name in ("saved", "p.parquet"):
        place = f"{tmp_path / name}:image"
        same(sources.source_of(recipe(source=place, captions="caption"), toy()), want)


def test_without_the_package_a_dataset_is_refused_in_one_line(tmp_path, monkeypatch):
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    for place in ("someone/something:text", f"{tmp_path / 'p.parquet'}:text"):
        with pytest.raises(UserError, match=r"data.prompts: .*pip install 'fewstep\[data\]'"):
            list_prompts(place)


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("nowhere.txt", "no such file: 'nowhere.txt'; give a text file, 'pack:starter'"),
        ("pack:startr", "no pack 'startr'; did you mean 'starter'"),
        ("nowhere.csv:text", "no such file: nowhere.csv"),
        ("{d}/p.csv", "is a table; name its column: '{d}/p.csv:COLUMN'"),
        ("{d}/p.csv:txt", "no column 'txt'; did you mean 'text'"),
        ("{d}/bad.jsonl:text", "bad.jsonl cannot be read"),
        ("{d}/list.json:text", "expected JSON objects"),
        ("{d}/latin.txt", "is not readable as UTF-8"),
        ("{d}/empty.txt", "holds no prompts"),
    ],
)
def test_prompts_that_are_not_there_are_refused_by_name(tmp_path, place, line):
    (tmp_path / "p.csv").write_text("text\nhello\n")
    (tmp_path / "bad.jsonl").write_text('{"text": \n')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "latin.txt").write_bytes("Köln".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError) as error:
        list_prompts(place.format(d=tmp_path))
    assert line.format(d=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_prompts_alone_give_batches_without_data(tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"{i} words\n" for i in range(40)))
    source = sources.source_of(recipe("sid", prompts=str(tmp_path / "p.txt")), toy())
    assert source.size == 40
    batch = source.batch(3, 1, 2, 5)
    assert batch.x is None and batch.noise.shape == (5, 4, 4, 4)
    assert batch.cond["text"].shape == (5, 6, 8)
    everything = torch.cat([source.batch(d, 0, 1, 8).cond["pooled"] for d in range(5)])
    want = toy().codec.condition([f"{i} words" for i in range(40)])["pooled"]
    gaps = torch.cdist(want, everything, compute_mode="donot_use_mm_for_euclid_dist")
    assert gaps.argmin(1).sort().values.tolist() == list(range(40))  # each once
    assert gaps.min(1).values.max() < 1e-6


def test_prompts_for_a_teacher_that_takes_none_are_refused():
    with pytest.raises(UserError, match=r"data\.prompts: 'pixels' takes no prompts"):
        sources.source_of(recipe("sid", prompts="pack:starter"), pixels())
    with pytest.raises(UserError, match="the teacher knows 10 classes"):
        sources.source_of(recipe("sid", prompts="pack:starter"), pixels(10))


# ---- images


def test_a_class_folder_in_memory_is_bit_for_bit_what_it_always_was(tmp_path):
    for name in ("ant", "bee"):
        folder_of(tmp_path / "a" / name, 12, captioned=False)
    source = sources.source_of(recipe(source=str(tmp_path / "a")), pixels(3))
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
    with pytest.raises(UserError, match=r"data\.captions: 'jsn': .*expected 'txt', 'json:KEY'"):
        list_images(str(a), "jsn", 0, True)


def test_shards_hold_what_the_folder_holds(tmp_path):
    a = folder_of(tmp_path / "a")
    samples = [(p.name, p.read_bytes()) for p in sorted(a.iterdir())]
    for k in range(4):
        tar_of(tmp_path / f"s-{k:02d}.tar", samples[k * 10 : k * 10 + 10])
    want = sources.source_of(recipe(source=str(a)), toy())
    for place in ("s-{00..03}.tar", "s-*.tar"):
        same(sources.source_of(recipe(source=str(tmp_path / place)), toy()), want)
    with pytest.raises(UserError, match=r"no such file: .*s-04\.tar"):
        list_images(str(tmp_path / "s-{00..04}.tar"), None, 0, True)


def test_labels_of_shards_are_their_cls_members(tmp_path):
    tar_of(tmp_path / "s.tar", [("x/1.cls", b"2"), ("x/1.png", png(1)), ("x/2.png", png(2)),
                                ("x/2.cls", b"0\n")])  # fmt: skip
    items = list_images(str(tmp_path / "s.tar"), None, 3, False).items
    assert [i.prompt for i in items] == ["2", "0"]
    assert items[1].image() == png(2)
    with pytest.raises(UserError, match=r"s\.tar/x/1 has label '2'; the teacher knows 2 classes"):
        sources.source_of(recipe(source=str(tmp_path / "s.tar")), pixels(2))


def test_a_photograph_that_lies_on_its_side_is_turned(tmp_path):
    tmp_path.joinpath("a").mkdir()
    upright = Image.fromarray(
        np.tile(np.linspace(0, 255, 16)[:, None, None], (1, 8, 3)).astype("u1")
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(tmp_path / "a/1.png", exif=exif)
    upright.save(tmp_path / "a/2.png")
    source = sources.source_of(recipe(source=str(tmp_path / "a")), pixels())
    assert torch.equal(source.x[0], source.x[1])


# ---- what is bad


def spoil(path, how):
    """Do one kind of harm to a good place of 200 samples; the name that is to be reported."""
    if how == "corrupt image":
        victim = path / "007.png"
        victim.write_bytes(victim.read_bytes()[:60])
    elif how == "empty caption":
        victim = path / "007.png"
        victim.with_suffix(".txt").write_text(" \n")
    else:
        victim = path
        with tarfile.open(victim) as tar:
            image = next(m for m in tar.getmembers() if m.name == "199.png")
        victim.write_bytes(victim.read_bytes()[: image.offset_data + 100])
    return str(victim)


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
    source = sources.source_of(recipe(**data), toy())
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
    with pytest.raises(UserError) as error:
        sources.source_of(recipe(**data, skip_share=0.001), toy())
    assert f"data.source: {str(place)!r}: {kind}: {name}: " in str(error.value)
    assert "1 of 200 items are bad, more than data.skip_share = 0.001 allows" in str(error.value)
    assert "\n" not in str(error.value)


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
    with pytest.raises(UserError, match=r"empty caption: .*p\.txt:2"):
        sources.source_of(recipe("sid", prompts=place), toy())


# ---- caches


def work(teacher=None, **data):
    made = sources.work_of(recipe(**data), teacher or toy())
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
    held = sources.source_of(recipe(**data), toy())
    cached = sources.source_of(recipe(**data, in_memory_gb=0), toy())
    assert len(list((tmp_path / "c").glob("*/shard-*"))) >= 5
    same(cached, held)
    again = sources.source_of(recipe(**data), toy())  # it is there now, and so it is read
    assert again.x is None
    same(again, held)


def test_a_cache_of_prompts_is_the_same_bits_and_holds_the_null_prompt(tmp_path, small):
    (tmp_path / "p.txt").write_text("".join(f"{i} words\n" for i in range(40)))
    data = {"prompts": str(tmp_path / "p.txt"), "cache": str(tmp_path / "c")}
    teacher = toy("blurry")
    held = sources.source_of(recipe("sid", **data), teacher)
    same(sources.source_of(recipe("sid", **data, in_memory_gb=0), teacher), held)
    made = sources.work_of(recipe("sid", **data), teacher)
    null = Cache(made, tmp_path / "c").null()
    want = teacher.codec.condition(["blurry"])
    assert null.keys() == want.keys()
    assert all(torch.equal(v, want[k]) for k, v in null.items())


def test_a_ready_cache_is_read_without_the_encoders(tmp_path, monkeypatch):
    folder_of(tmp_path / "a", 40)
    data = {"source": str(tmp_path / "a"), "cache": str(tmp_path / "c"), "in_memory_gb": 0}
    first = sources.source_of(recipe(**data), toy())
    monkeypatch.setattr(encode.Work, "encode", lambda *_: pytest.fail("it encoded again"))
    same(sources.source_of(recipe(**data), toy()), first)


def forked(folder, root, rank=0, world=1, pause=0.0):
    """A process that builds the folder's cache under `root`, a pause before each group of items."""
    if child := os.fork():
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        at_once, cache.SHARD_ITEMS = encode.Work.encode, encode.TOGETHER

        def later(self, items):
            time.sleep(pause)
            return at_once(self, items)

        encode.Work.encode = later
        data = {"source": str(folder), "cache": str(root), "in_memory_gb": 0, "skip_share": 0.1}
        sources.source_of(recipe(**data), toy())
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
    first = sources.source_of(recipe(**data), toy())
    victim = next((tmp_path / "c").glob("*/shard-00001*"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-9])
    with pytest.raises(
        UserError, match=r"shard-00001\.safetensors is missing or damaged.*delete it"
    ):
        sources.source_of(recipe(**data), toy())
    victim.unlink()
    same(sources.source_of(recipe(**data), toy()), first)
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
    sources.source_of(recipe(source=str(a)), used)
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
    with pytest.raises(UserError, match=r"data\.cache_limit_gb: 20 items of .* over the limit"):
        sources.source_of(
            recipe(**data, cache=str(tmp_path / "c"), cache_limit_gb=need * 0.99 / 1e9), toy()
        )
    with pytest.raises(UserError, match=r"is not a folder that can be written to"):
        sources.source_of(recipe(**data, cache=str(tmp_path / "a/001.png/c")), toy())
    assert {p.name for p in tmp_path.iterdir()} == {"a"}
    sources.source_of(recipe(**data, cache=str(tmp_path / "c"), cache_limit_gb=need / 1e9), toy())


def test_a_codec_whose_conditions_vary_in_length_is_named(tmp_path):
    (tmp_path / "p.txt").write_text("one\n" * 20 + "a longer one\n" * 20)
    teacher = toy()
    teacher.codec.condition = lambda prompts: {"text": torch.zeros(len(prompts), len(prompts[-1]))}
    with pytest.raises(UserError, match=r"its codec made cond.text of shape .* pad it"):
        sources.source_of(recipe("sid", prompts=str(tmp_path / "p.txt")), teacher)


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
    with pytest.raises(UserError, match="is 4×8×8; the teacher takes 4×4×4"):
        sources.source_of(recipe(source=str(tmp_path / "a"), size=16), toy())
    with pytest.raises(UserError, match=r"data\.size: 9 is no multiple of 2"):
        sources.source_of(recipe(source=str(tmp_path / "a"), size=9), toy())
    with pytest.raises(UserError, match=r"data\.buckets\.multiple: 3 is no multiple of 2"):
        sources.source_of(recipe(source=str(tmp_path / "a"), buckets={"multiple": 3}), toy())


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"prompts": 5}, "data.prompts: expected a valid string, not 5"),
        ({"prompts": {"hf": "a", "colum": "b"}}, "data.prompts.colum: unknown key; did you mean"),
        ({"prompts": {"hf": "a"}}, "data.prompts.column: missing"),
        ({"source": "x", "prompts": "y"}, "data.prompts: the images of data.source have captions"),
        ({"buckets": {}}, "data.buckets: there are no images to sort"),
        ({"source": "x", "buckets": {"ratio": 0.5}}, "data.buckets.ratio: expected greater than"),
        ({"skip_share": 1.5}, "data.skip_share: expected less than or equal to 1"),
        ({"promts": "x"}, "data.promts: unknown key; did you mean 'prompts'"),
    ],
)
def test_a_data_section_is_checked_key_by_key(data, line):
    with pytest.raises(UserError) as error:
        recipe("sid", **data)
    assert line in str(error.value)


def test_a_recipe_with_a_column_reads_back_as_itself():
    made = recipe("sid", prompts={"hf": "someone/something", "column": "text"})
    assert Recipe.check(made.tree()) == made


# ---- whole runs


def called(capsys, *words):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["distill", *map(str, words)])
        cli.main()
    return stopped.value.code, *capsys.readouterr()


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
    assert code == 0 and "cached already in" in out
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
    with pytest.raises(UserError, match="is a folder; give a text file"):
        list_prompts(str(tmp_path))
