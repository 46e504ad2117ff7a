"""Protocols as files, reference statistics, and exports for other people's scorers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from eval import fetch
from eval.catalogue import CATALOGUE
from eval.errors import MetricError
from eval.metrics.features import Embedded, Prepared
from eval.metrics.fid import FID, Moments
from eval.prompt_benchmarks import dpg, geneval
from eval.protocols import reference, spec
from eval.protocols.measure import PROTOCOLS, protocol, read
from eval.protocols.reference import Reference, find, of_folder
from eval.resize import centre_lanczos
from eval.samples import Samples

TOY = Embedded("toy", "1", 12, lambda images: images[:, :, ::2, ::2].flatten(1).float())


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pictures(n, side=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, side, side), generator=rng, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path):
    """Sixty PNGs of 4×4, in two subfolders."""
    for i, image in enumerate(pictures(60)):
        path = tmp_path / "real" / str(i % 2) / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return tmp_path / "real"


# reference statistics


def test_statistics_of_a_folder_are_those_of_its_pictures(folder):
    found = of_folder("toys", folder, TOY, keep=20)
    images = pictures(60)
    whole = Moments.from_features(TOY(torch.cat([images[::2], images[1::2]])))
    torch.testing.assert_close(found.moments.mean, whole.mean)
    torch.testing.assert_close(found.moments.cov, whole.cov)
    assert found.moments.n == 60 and found.features.shape == (20, 12)
    assert FID(TOY, found.moments)(Samples(images, []))["fd"] == pytest.approx(0, abs=1e-6)


def test_statistics_are_read_from_the_cache_until_a_picture_changes(folder, cache, monkeypatch):
    made = of_folder("toys", folder, TOY)
    (path,) = (cache / "references").iterdir()
    assert path.name == f"toys.toy.{made.content[:16]}.safetensors"
    monkeypatch.setattr(reference, "chunks", None)  # no picture is read again
    again = of_folder("toys", folder, TOY)
    assert torch.equal(again.moments.cov, made.moments.cov)
    assert torch.equal(again.features, made.features)
    monkeypatch.undo()
    monkeypatch.setenv("FEWSTEP_CACHE", str(cache))
    Image.new("RGB", (4, 4)).save(folder / "0" / "000.png")
    assert of_folder("toys", folder, TOY).content != made.content
    with pytest.raises(MetricError, match=r"2 files by toy .*delete all but one"):
        find("toys", TOY, 60)


def test_statistics_of_another_rule_or_number_are_refused(folder, cache):
    of_folder("toys", folder, TOY)
    assert find("toys", TOY, 60).moments.n == 60
    with pytest.raises(MetricError, match=r"is of 60 images; make it of 61"):
        find("toys", TOY, 61)
    newer = Embedded("toy", "2", 12, TOY.read)
    with pytest.raises(MetricError, match=r"made by 'toy 1, .* the metric needs 'toy 2, "):
        find("toys", newer, 60)
    with pytest.raises(MetricError, match=r"by toy-centre_lanczos-2 .*: distill reference toys"):
        find("toys", Prepared(centre_lanczos, 2, TOY), 60)


def test_a_file_that_holds_no_statistics_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not this")
    with pytest.raises(MetricError, match="not a file of reference statistics"):
        Reference.load(path, TOY)


def test_published_moments_serve_distances_and_nothing_else(tmp_path, cache, monkeypatch):
    x = torch.randn(100, 12).double()
    np.savez(tmp_path / "stats.npz", mu=x.mean(0).numpy(), sigma=torch.cov(x.T).numpy())
    found = reference.published("toys", tmp_path / "stats.npz", TOY, 100)
    torch.testing.assert_close(found.moments.cov, torch.cov(x.T))
    found.save(reference.path_of("toys", TOY, None, found.content))
    assert find("toys", TOY, 100).features.shape == (0, 12)
    monkeypatch.setitem(spec.EXTRACTORS, "toy", TOY)
    against = {**BASE, "reference": {"name": "toys", "count": 100}}
    path = tmp_path / "mine.yaml"
    fid = {"fid": {"kind": "frechet", "features": "toy"}}
    path.write_text(json.dumps({**against, "metrics": fid}))
    assert read(path).metrics[0].reference.n == 100
    path.write_text(json.dumps({**against, "metrics": {"prdc": {"features": "toy"}}}))
    with pytest.raises(MetricError, match="holds moments alone"):
        read(path)
    np.savez(tmp_path / "stats.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(MetricError, match=r"not an .npz of mu and sigma"):
        reference.published("toys", tmp_path / "stats.npz", TOY, 100)


def test_pictures_of_many_sizes_are_prepared_before_their_features(tmp_path):
    images = [pictures(1, 6 + i % 3, i)[0] for i in range(30)]
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:03}.png")
    small = Prepared(centre_lanczos, 4, TOY)
    found = of_folder("toys", tmp_path, small)
    one_by_one = torch.cat([small(image[None]) for image in images])
    assert torch.equal(found.features, one_by_one)
    with pytest.raises(MetricError, match="no images in"):
        of_folder("none", tmp_path / "none", TOY)


# protocols as files


def test_every_protocol_is_written_as_it_should_be_and_its_figures_are_described():
    for name in spec.names():
        written = spec.spec(spec.FOLDER / f"{name}.yaml")
        assert PROTOCOLS[name].__doc__ == written.summary and len(written.summary) < 110
        assert written.count % written.chunk == 0
        for key in set(written.metrics) - {"prdc"}:
            assert key in CATALOGUE, f"{name}: {key}"
    assert set(PROTOCOLS) == {
        "cifar10-50k", "coco2014-30k", "coco2017-5k", "digits", "imagenet64-50k", "mjhq-30k",
        "sdxl-10k", "shapes",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["coco2014-30k", "coco2017-5k"])
def test_cmmd_of_coco_is_of_the_pictures_as_they_are_which_it_crops_and_resizes_itself(name):
    needs = spec.spec(spec.FOLDER / f"{name}.yaml").feature_requests(name)
    found = {n.metric: n.features.rule for n in needs}
    assert found[f"cmmd of {name}"].endswith(", centre_then_resize to 336")
    assert found[f"cmmd of {name}"].startswith("clip-vitl14-336 ")
    assert found[f"fid of {name}"].startswith("centre_lanczos to 256, then inception-clean")


def test_labels_are_balanced_in_every_chunk():
    written = spec.spec(spec.FOLDER / "cifar10-50k.yaml")
    prompts = written.all_prompts("cifar10-50k")
    assert len(prompts) == 50_000
    assert all(prompts[:1000].count(str(c)) == 100 for c in range(10))


def test_a_protocol_whose_reference_or_captions_are_missing_says_where_they_go(cache):
    with pytest.raises(MetricError, match=r"reference cifar10-train: no statistics by inception"):
        protocol("cifar10-50k")
    with pytest.raises(MetricError, match=r"captions: .*coco2014-30k.txt is missing; write it"):
        protocol("coco2014-30k")
    (cache / "captions").mkdir(parents=True)
    (cache / "captions" / "coco2014-30k.txt").write_text("a cat\na dog\n")
    with pytest.raises(MetricError, match="its prompts are 2; it takes 30000"):
        protocol("coco2014-30k")


def test_a_protocol_with_all_at_hand_measures(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(spec.EXTRACTORS, "toy", TOY)
    of_folder("toys", folder, TOY)
    path = tmp_path / "mine.yaml"
    path.write_text(
        "summary: Mine.\nprompts: {source: labels, classes: 2, each: 30}\ncount: 60\nseeds: 1\n"
        "chunk: 20\nside: 4\nreference: {name: toys, count: 60}\nmetrics:\n"
        "  fid: {kind: frechet, features: toy}\n"
        "  kid: {features: toy, subset_size: 50, subsets: 3}\n"
        "  vendi: {features: toy}\n"
    )
    images = pictures(60, seed=7)
    found = read(path)(lambda p, s: Samples(images[20 * s : 20 * s + 20], p, 1.0), seeds=1)
    real = Moments.from_features(TOY(pictures(60)))
    assert found["fid"] == pytest.approx(FID(TOY, real)(Samples(images, []))["fd"], rel=1e-6)
    assert {"fid_bias", "kid", "kid_std", "vendi"} < set(found)
    assert found["protocol"] == "mine" and found["images_per_s"] == pytest.approx(20)
    with pytest.raises(MetricError, match="samples are 8×8 pixels; it takes 4×4"):
        read(path)(lambda p, s: Samples(pictures(len(p), 8), p), seeds=1)


@pytest.mark.parametrize("kind", ["fd", "kid", "inception_score", "fd_infinity"])
def test_too_few_samples_for_a_metric_are_refused_before_any_is_drawn(tmp_path, kind):
    path = tmp_path / "mine.yaml"
    metric = {
        "fd": {"kind": "frechet", "features": "digits"},
        "kid": {"features": "digits"},
        "inception_score": {"features": "digits", "splits": 40},
        "fd_infinity": {"kind": "frechet_infinity", "features": "digits"},
    }[kind]
    few = {"prompts": {"source": "labels", "classes": 2, "each": 30}, "count": 60}
    path.write_text(json.dumps({**BASE, **few, "metrics": {kind: metric}}))
    takes = {"fd": 65, "kid": 1000, "inception_score": 80, "fd_infinity": 5001}[kind]
    with pytest.raises(MetricError, match=f"mine: 60 samples; .* takes {takes} or more"):
        read(path)(lambda p, s: pytest.fail("a sample was drawn"))


BASE = {
    "summary": "x", "prompts": {"source": "digits"}, "count": 1797, "seeds": 1, "chunk": 9,
    "reference": {"name": "digits", "count": 1797},
    "metrics": {"fd": {"kind": "frechet", "features": "digits"}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sedes": 3}, "sedes: Extra inputs"),
        ({"count": "1797"}, "count: Input should be a valid integer"),
        ({"count": 0}, "count: Input should be greater than or equal to 1"),
        ({"prompts": {"source": "digit"}}, "prompts: "),
        ({"prepare": "centre_bicubic"}, "prepare: Input should be 'untouched'"),
        ({"metrics": {"fd": {"kind": "frechte"}}}, "did you mean 'frechet'"),
        ({"metrics": {"kid": {}}}, "no features are named"),
        ({"metrics": {"kid": {"features": "digit"}}}, "did you mean 'digits'"),
        ({"metrics": {"kid": {"features": "digits", "subset": 3}}}, "did you mean 'subsets'"),
        ({"metrics": {"kid": {"features": "digits", "subsets": "3"}}}, "subsets: Input should be"),
        ({"metrics": {"kid": {"features": "digits", "prepare": "crop"}}}, "prepare 'crop'"),
        (
            {"metrics": {"kid": {"features": "digits", "prepare": "centre_patch"}}},
            "centre_patch needs a size",
        ),
        ({"metrics": {"clip_score": {"source": "x/y"}}}, "it lacks revision"),
        ({"metrics": {"kid": {"features": "digits", "size": 9}}}, "option 'size' is unknown"),
        ({"reference": {"name": "digits", "count": 1798}}, "the embedded digits are 1797"),
        ({"reference": {"name": "shapes", "count": 7}}, "the embedded shapes are 0"),
        ({"reference": None}, "it needs a reference"),
    ],
)
def test_a_mistake_in_a_protocol_is_one_line_that_names_its_place(tmp_path, change, said):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({**BASE, **change}))  # JSON is YAML
    with pytest.raises(MetricError) as caught:
        read(path)
    assert str(caught.value).startswith("protocol mine") and "\n" not in str(caught.value)
    assert said in str(caught.value)


def test_what_is_not_yaml_is_one_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("a: [1\nb: 2")
    with pytest.raises(MetricError, match="protocol mine: not YAML") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert fetch.cache() == tmp_path / "cache"
    monkeypatch.delenv("FEWSTEP_CACHE")
    assert fetch.cache().parts[-2:] == (".cache", "fewstep")


# other people's scorers


def test_genevals_folders_are_those_that_its_scorer_walks(tmp_path):
    lines = [{"tag": "a", "prompt": "a bench"}, {"tag": "b", "prompt": "a cow"}]
    images = pictures(4)
    geneval(Samples(images, ["a cow", "a bench"] * 2), lines, tmp_path)
    for folder in sorted(tmp_path.iterdir()):  # as its evaluate_images.py reads them
        assert folder.name.isdigit()
        assert json.loads((folder / "metadata.jsonl").read_text()) == lines[int(folder.name)]
        assert [p.name for p in sorted((folder / "samples").iterdir())] == [
            "00000.png",
            "00001.png",
        ]
    with Image.open(tmp_path / "00001" / "samples" / "00001.png") as f:
        assert f.getpixel((1, 2)) == tuple(images[2, :, 2, 1].tolist())
    with pytest.raises(MetricError, match="no image of 'a cow'"):
        geneval(Samples(images[:1], ["a bench"]), lines, tmp_path)


def test_dpgs_grids_hold_four_pictures_row_by_row(tmp_path):
    images = pictures(4)
    dpg(Samples(images, ["long text"] * 4), {"partiprompts12": "long text"}, tmp_path)
    with Image.open(tmp_path / "partiprompts12.png") as f:
        boxes = [(0, 0, 4, 4), (4, 0, 8, 4), (0, 4, 4, 8), (4, 4, 8, 8)]  # its scorer's crops
        for image, box in zip(images, boxes):
            assert f.crop(box).getpixel((3, 1)) == tuple(image[:, 1, 3].tolist())
    with pytest.raises(MetricError, match="3 images of partiprompts12"):
        dpg(Samples(images[:3], ["long text"] * 3), {"partiprompts12": "long text"}, tmp_path)
    with pytest.raises(MetricError, match="'other' is none of its prompts"):
        dpg(Samples(images, ["long text"] * 3 + ["other"]), {"p": "long text"}, tmp_path)
