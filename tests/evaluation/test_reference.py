"""`distill reference`: what protocols compare with, made by one command; and what it refuses."""

import tokenize
import zipfile
import zlib

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from distill.evaluation import references
from eval.errors import MetricError
from eval.metrics.features import Embedded, Prepared
from eval.metrics.fid import Moments
from eval.protocols import reference, spec
from eval.protocols.measure import PROTOCOLS, read
from eval.resize import centre_lanczos
from eval.samples import Samples
from tests.helpers.command_line import called
from tests.helpers.refusals import refused_line

CALLS: list[str] = []


def features(name, version="1", dim=12):
    """The pictures' first `dim` bytes, noting that a network has run."""

    def look(images):
        CALLS.append(name)
        return images.flatten(1)[:, :dim].float()

    return Embedded(name, version, dim, look)


@pytest.fixture(autouse=True)
def world(monkeypatch, tmp_path):
    """Small protocols on a set `toys`; one needs neighbours; two need no set."""
    CALLS.clear()
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(spec, "FOLDER", tmp_path / "protocols")
    for name, dim in (("toy", 12), ("wide", 16), ("same", 12)):
        monkeypatch.setitem(spec.EXTRACTORS, name, features(name, dim=dim))
    base = {
        "summary": "x", "prompts": {"source": "labels", "classes": 10, "each": 6}, "count": 60,
        "seeds": 1, "chunk": 20, "side": 4,
    }  # fmt: skip
    toys = {**base, "reference": {"name": "toys", "count": 40}}
    fid = {"kind": "frechet", "features": "toy"}
    wide = {"wide": {**fid, "features": "wide"}, "prdc": {"features": "wide"}}
    written = {
        "plain": {**toys, "metrics": {"fid": fid, "vendi": {"features": "toy"}}},
        "both": {**toys, "metrics": {"fid": fid, **wide}},
        "small": {
            **toys,
            "metrics": {"a": {**fid, "prepare": "centre_lanczos", "size": 2},
                        "b": {**fid, "features": "same"}},
        },
        "digital": {**base, "reference": {"name": "digits", "count": 1797}, "metrics": {}},
        "free": {**base, "metrics": {}},
    }  # fmt: skip
    (tmp_path / "protocols").mkdir()
    for name, tree in written.items():
        path = tmp_path / "protocols" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        monkeypatch.setitem(PROTOCOLS, name, lambda path=path: read(path))
    return tmp_path


def pictures(n=40, side=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, side, side), generator=rng, dtype=torch.uint8)


def saved(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "real", pictures())


@pytest.fixture
def moments(tmp_path):
    """Published moments of the pictures' twelve features."""
    x = pictures().flatten(1)[:, :12].double()
    np.savez(tmp_path / "m.npz", mu=x.mean(0).numpy(), sigma=torch.cov(x.T).numpy())
    return tmp_path / "m.npz"


def files(world):
    return sorted(p.name.split(".")[1] for p in (world / "cache" / "references").glob("*"))


def test_one_call_makes_every_kind_of_features_that_a_protocol_reads(world, folder, capsys):
    code, out, err = called(capsys, "reference", "toys", folder, "--protocol", "both")
    assert code == 0, err
    assert files(world) == ["toy", "wide"]
    assert "toys: 40 images, 2 kinds of features" in out
    whole = {k: pictures().flatten(1)[:, :n].float() for k, n in (("toy", 12), ("wide", 16))}
    for name, x in whole.items():
        found = reference.find("toys", spec.EXTRACTORS[name], 40)
        torch.testing.assert_close(found.moments.cov, Moments.from_features(x).cov)
        assert torch.equal(found.features, x)
    figures = read(spec.FOLDER / "both.yaml").measure_seed(
        lambda p, _: Samples(pictures(len(p)), p), 0
    )
    assert figures["wide"] >= 0 and figures["recall"] > 0


def test_all_protocols_of_the_set_are_served_where_none_is_named(world, folder, capsys):
    assert called(capsys, "reference", "toys", folder)[0] == 0
    assert files(world) == ["same", "toy", "toy-centre_lanczos-2", "wide"]
    small = Prepared(centre_lanczos, 2, spec.EXTRACTORS["toy"])
    torch.testing.assert_close(
        reference.find("toys", small, 40).moments.mean,
        small(pictures()).double().mean(0),
    )


def test_what_is_there_is_not_made_again(world, folder, capsys):
    called(capsys, "reference", "toys", folder, "--protocol", "plain")
    CALLS.clear()
    code, out, _ = called(capsys, "reference", "toys", folder, "--protocol", "both")
    assert (code, set(CALLS)) == (0, {"wide"})
    assert out.count("exists already") == 1
    CALLS.clear()
    assert called(capsys, "reference", "toys", folder, "--protocol", "both")[0] == 0
    assert CALLS == []


def test_statistics_that_are_damaged_or_by_an_older_rule_are_made_anew(
    world, folder, capsys, monkeypatch
):
    called(capsys, "reference", "toys", folder, "--protocol", "plain")
    monkeypatch.setitem(spec.EXTRACTORS, "toy", features("toy", "2"))
    assert called(capsys, "reference", "toys", folder, "--protocol", "plain")[0] == 0
    assert reference.find("toys", spec.EXTRACTORS["toy"], 40).rule.startswith("toy 2,")
    (path,) = (world / "cache" / "references").iterdir()
    path.write_bytes(b"half of it")
    assert called(capsys, "reference", "toys", folder, "--protocol", "plain")[0] == 0
    assert reference.find("toys", spec.EXTRACTORS["toy"], 40).moments.n == 40


def test_published_moments_serve_distances_and_leave_the_rest_to_pictures(
    world, folder, moments, capsys
):
    code, out, err = called(capsys, "reference", "toys", moments, "--protocol", "both")
    assert code == 0, err
    assert "unchecked" in out and "still missing: wide" in out
    found = reference.find("toys", spec.EXTRACTORS["toy"], 40)
    assert found.moments.n == 40 and not len(found.features)
    x = pictures().flatten(1)[:, :12].double()
    torch.testing.assert_close(found.moments.cov, torch.cov(x.T))
    code, out, err = called(capsys, "reference", "toys", folder, "--protocol", "both")
    assert code == 0, err
    assert set(CALLS) == {"wide"} and files(world) == ["toy", "wide"]
    read(spec.FOLDER / "both.yaml")


def test_moments_that_may_be_of_several_features_must_be_named(world, moments, capsys):
    words = ("reference", "toys", moments, "--protocol", "small")
    code, _, err = called(capsys, *words)
    assert code == 2 and "may be of toy-centre_lanczos-2 or same; name one" in err
    assert called(capsys, *words, "--features", "same")[0] == 0
    assert files(world) == ["same"]


def test_the_error_of_a_missing_reference_names_the_command_that_makes_it(world, capsys):
    code, _, err = called(capsys, "eval", "digits", "--protocol", "plain")
    assert (code, err.count("\n")) == (2, 1)
    assert "no statistics by toy" in err and "distill reference toys FOLDER" in err


def test_moments_alone_where_features_are_needed_name_the_command_too(world, moments, capsys):
    wide = torch.cov(torch.randn(16, 99)).double().numpy()
    np.savez(world / "w.npz", mu=np.zeros(16), sigma=wide)
    made = reference.published("toys", world / "w.npz", spec.EXTRACTORS["wide"], 40)
    made.save(reference.path_of("toys", spec.EXTRACTORS["wide"], None, made.content))
    called(capsys, "reference", "toys", moments, "--protocol", "plain")
    code, _, err = called(capsys, "eval", "digits", "--protocol", "both")
    assert code == 2 and "prdc: the reference toys holds moments alone" in err
    assert "distill reference toys FOLDER" in err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["toyz", "{f}"], ("reference 'toyz'", "'toys'")),
        (["toys", "{f}", "--protocol", "plane"], ("", "'plane'", "'plain'")),
        (["digits", "{f}", "--protocol", "digital"], ("--protocol", "--protocol digital: ")),
        (["toys", "{f}", "--protocol", "free"], ("--protocol", "--protocol free: ")),
        (["toyz", "{f}", "--protocol", "both"], ("--protocol", "toys", "toyz")),
        (["toys", "{w}/nowhere"], ("*/nowhere", ".npz")),
        (["toys", "{w}/protocols"], ("reference toys", "no images", "protocols")),
        (["toys", "{f}", "--features", "toy"], ("--features", ".npz")),
        (["toys", "{w}/few"], ("reference toys", "39 ", "few")),
        (["toys", "{w}/few"], ("reference toys", "few", " 40")),
        (["toys", "{w}/large"], ("reference toys", "000.png", "5×5", "4×4")),
        (["toys", "{w}/broken"], ("reference toys", "007.png", "cannot identify")),
        (["toys", "{w}/cut"], ("reference toys", "000.png")),
        (
            ["toys", "{w}/m.npz", "--protocol", "small", "--features", "sane"],
            ("--features", "same"),
        ),
        (["toys", "{w}/w.npz", "--protocol", "both"], ("*/w.npz", "prdc", "both")),
        (
            ["toys", "{w}/w.npz", "--protocol", "plain"],
            ("*/w.npz", "16", "plain", "toy", "12"),
        ),
        (
            ["toys", "{w}/w.npz", "--protocol", "plain", "--features", "toy"],
            ("reference */w.npz", "16", "toy", "12"),
        ),
        (["toys", "{w}/odd.npz"], ("reference */odd.npz", "mu", "sigma")),
        (["toys", "{w}/text.npz"], ("reference */text.npz", "mu", "sigma")),
        (["toys", "{w}/nan.npz"], ("reference */nan.npz", "NaN")),
        (["toys", "{w}/square.npz"], ("reference */square.npz", "(12, 12)", "(12, 1)")),
    ],
)
def test_a_mistake_is_one_line_before_any_network_runs(world, folder, moments, capsys, words, line):
    saved(world / "few", pictures(39))
    saved(world / "large", pictures(side=5))
    (saved(world / "broken", pictures()) / "007.png").write_text("no picture")
    cut = saved(world / "cut", pictures()) / "000.png"
    cut.write_bytes(cut.read_bytes()[:60])
    np.savez(world / "w.npz", mu=np.zeros(16), sigma=np.eye(16))
    np.savez(world / "odd.npz", mean=np.zeros(12))
    np.savez(world / "nan.npz", mu=np.zeros(12), sigma=np.eye(12) * np.nan)
    np.savez(world / "square.npz", mu=np.zeros((12, 1)), sigma=np.eye(12))
    (world / "text.npz").write_text("moments")
    words = [w.replace("{f}", str(folder)).replace("{w}", str(world)) for w in words]
    code, out, err = called(capsys, "reference", *words)
    assert code == 2, (out, err)
    refused_line(err, *line)
    assert CALLS == [] and not (world / "cache" / "references").exists()


def bad_archive(path, kind):
    """An .npz that is damaged in one way."""
    np.savez(path, mu=np.zeros(12), sigma=np.eye(12))
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "encrypted":  # the flag of its members, in each of the archive's two places
        content = bytearray(path.read_bytes())
        for mark, flag in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            content[content.index(mark) + flag] |= 1
        path.write_bytes(content)
    elif kind == "deflated":
        np.savez_compressed(path, mu=np.zeros(12), sigma=np.eye(12))
        content = bytearray(path.read_bytes())
        start = 30 + int.from_bytes(content[26:28], "little") + int.from_bytes(
            content[28:30], "little"
        )  # fmt: skip
        content[start] = 0xFF  # no kind of block
        path.write_bytes(content)
    else:
        shape = "(1000000000000000,)" if kind == "gigantic" else "((((,)"
        header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}"
        header = header.ljust(117) + "\n"
        with zipfile.ZipFile(path, "w") as f:
            f.writestr("mu.npy", b"\x93NUMPY\1\0\x76\0" + header.encode())
    return path


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("empty", EOFError),
        ("encrypted", RuntimeError),
        ("deflated", zlib.error),
        ("gigantic", MemoryError),
        ("header", (tokenize.TokenError, SyntaxError, ValueError)),
    ],
)
def test_a_damaged_archive_is_one_line_whatever_its_damage(tmp_path, kind, cause):
    path = bad_archive(tmp_path / "x.npz", kind)
    with pytest.raises(MetricError, match=r"x\.npz: not an \.npz of mu and sigma") as caught:
        reference.moments_of(path)
    assert isinstance(caught.value.__cause__, cause)


SKEW = np.eye(3) + np.diag([0.0, 1e-3], 1)


@pytest.mark.parametrize(
    ("mu", "sigma", "said"),
    [
        (np.zeros(3), SKEW, "it is not symmetric"),
        (np.zeros(3), np.diag([1.0, 1.0, -1e-5]), "it has the eigenvalue -1e-05"),
        (np.zeros(3), -np.eye(3), "it has the eigenvalue -1"),
        (np.zeros(3) * 1j, np.eye(3), "mu is of complex128"),
        (np.zeros(3), np.eye(3) + 0j, "sigma is of complex128"),
        (np.zeros(3), np.eye(3, dtype=bool), "sigma is of bool"),
        (np.array(["0", "1", "2"]), np.eye(3), "mu is of <U1"),
        (np.zeros(0), np.zeros((0, 0)), r"sigma is \(0, 0\)"),
    ],
)
def test_what_is_no_covariance_or_not_real_is_refused(tmp_path, mu, sigma, said):
    np.savez(tmp_path / "x.npz", mu=mu, sigma=sigma)
    with pytest.raises(MetricError, match=said):
        reference.moments_of(tmp_path / "x.npz")


@pytest.mark.parametrize("kind", ["<f4", ">f8", "<f2", "<i8"])
def test_real_moments_of_any_width_and_order_are_read_with_their_rounding(tmp_path, kind):
    sigma = np.diag([2.0, 1.0, 0.0])
    np.savez(tmp_path / "x.npz", mu=np.arange(3).astype(kind), sigma=sigma.astype(kind))
    mean, cov = reference.moments_of(tmp_path / "x.npz")
    assert mean.tolist() == [0, 1, 2] and torch.equal(cov, torch.from_numpy(sigma))
    sigma[2, 2], sigma[0, 1] = -1e-7, 1e-7
    np.savez(tmp_path / "y.npz", mu=np.zeros(3), sigma=sigma)
    assert torch.equal(reference.moments_of(tmp_path / "y.npz")[1], torch.from_numpy(sigma))


def test_statistics_of_other_pictures_are_never_joined_by_a_second_set(world, folder, capsys):
    called(capsys, "reference", "toys", folder, "--protocol", "plain")
    other = saved(world / "other", pictures(seed=1))
    CALLS.clear()
    code, _, err = called(capsys, "reference", "toys", other, "--protocol", "both")
    assert code == 2 and "is of other images; delete it first" in err
    assert CALLS == [] and files(world) == ["toy"]


def test_moments_never_join_statistics_of_pictures(world, folder, moments, capsys):
    called(capsys, "reference", "toys", folder, "--protocol", "plain")
    code, _, err = called(capsys, "reference", "toys", moments, "--protocol", "plain")
    assert code == 2 and "exists already; delete it first" in err
    assert files(world) == ["toy"]


def test_weights_that_are_not_to_be_had_are_said_before_the_long_work(
    world, folder, capsys, monkeypatch
):
    def none(images):
        raise MetricError("weights wide: not to be had")

    monkeypatch.setitem(spec.EXTRACTORS, "wide", Embedded("wide", "1", 16, none))
    code, _, err = called(capsys, "reference", "toys", folder, "--protocol", "both")
    assert code == 2 and "weights wide: not to be had" in err
    assert CALLS == ["toy"] and not (world / "cache" / "references").exists()  # one picture


def test_the_shipped_protocols_ask_for_what_their_metrics_read(monkeypatch):
    monkeypatch.undo()
    asked = references.request_for("cifar10-train")
    assert asked.count == 50_000 and asked.side == 32 and asked.protocols == "cifar10-50k"
    assert {n.features.name: n.vectors for n in asked.features} == {
        "inception-edm": True, "dinov2-vitl14": False
    }  # fmt: skip
    asked = references.request_for("coco2014-10k", "sdxl-10k")
    assert {n.features.name: n.vectors for n in asked.features} == {
        "inception-clean-centre_lanczos-512": False,
        "inception-clean-centre_patch-299": False,
    }
    assert asked.side is None
    sets = [
        (v.name, v.count)
        for k in spec.names()
        if (v := spec.spec(spec.FOLDER / f"{k}.yaml").reference)
    ]
    assert len({name for name, _ in sets}) == len(set(sets))  # a set has one count, whoever asks
