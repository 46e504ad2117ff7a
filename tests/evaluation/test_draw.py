"""`distill draw`: a benchmark's prompts as its own scorer takes them, and what is refused."""

import json

import pytest
import torch
from PIL import Image

from distill.evaluation import prompt_benchmarks as benchmarks
from distill.evaluation import subject
from distill.evaluation.subject import Subject
from eval.prompt_benchmarks import dpg_prompts, geneval_prompts
from eval.samples import Samples
from eval.stream import Processes
from teachers.catalogue.loading import load
from tests.helpers.command_line import called
from tests.helpers.refusals import refused, refused_line

PROMPTS = ["a red circle", "a blue square", "a red circle"]  # GenEval's own may come twice


@pytest.fixture
def metadata(tmp_path):
    """GenEval's file, of three prompts."""
    lines = [{"tag": "colors", "prompt": p, "include": [{"count": 1}]} for p in PROMPTS]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture
def texts(tmp_path):
    """DPG-Bench's folder, of three prompts."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    for i, prompt in enumerate(PROMPTS):
        (folder / f"p{i}.txt").write_text(f"{prompt}\n")
    return folder


def painter(asked, drawn):
    """Draws pictures of one colour, (seed, place, 0); notes what it was asked for."""

    def draw(prompts, steps, batch):
        assert prompts == [v.prompt for v in asked]

        def some(wanted, seed):
            drawn.append((wanted, seed))
            colours = torch.tensor([[seed, i, steps] for i in range(len(wanted))])
            return Samples(colours.to(torch.uint8)[:, :, None, None].expand(-1, -1, 2, 2), wanted)

        return some

    return Subject("student", None, None, draw, {}, None)  # pyright: ignore[reportArgumentType]


def test_genevals_folders_hold_four_pictures_of_each_line_and_go_on(metadata, tmp_path):
    asked, drawn, out = geneval_prompts(metadata), [], tmp_path / "out"
    benchmarks.sample_prompts(painter(asked, drawn), "geneval", asked, out, 2, seed=5)
    assert drawn == [([p] * 4, 15 + i) for i, p in enumerate(PROMPTS)]
    for i in range(3):
        line = json.loads((out / f"0000{i}" / "metadata.jsonl").read_text())
        assert line == json.loads(metadata.read_text().splitlines()[i])
        names = sorted(p.name for p in (out / f"0000{i}" / "samples").iterdir())
        assert names == [f"0000{k}.png" for k in range(4)]
        with Image.open(out / f"0000{i}" / "samples" / "00003.png") as f:
            assert f.getpixel((0, 0)) == (15 + i, 3, 2)
    (out / "00001" / "metadata.jsonl").unlink()  # cut off in its pictures
    drawn.clear()
    benchmarks.sample_prompts(painter(asked, drawn), "geneval", asked, out, 2, seed=5)
    assert drawn == [([PROMPTS[1]] * 4, 16)]


def test_dpgs_grids_are_shared_by_processes_and_are_those_of_one(texts, tmp_path):
    asked, one = dpg_prompts(texts), tmp_path / "one"
    benchmarks.sample_prompts(painter(asked, []), "dpg", asked, one, 1)
    for rank in (0, 1):
        drawn = []
        share = painter(asked, drawn)
        benchmarks.sample_prompts(share, "dpg", asked, tmp_path / "two", 1, 0, Processes(rank, 2))
        assert len(drawn) == 2 - rank
    for i in range(3):
        assert (one / f"p{i}.png").read_bytes() == (tmp_path / "two" / f"p{i}.png").read_bytes()
        with Image.open(one / f"p{i}.png") as f:
            assert f.size == (4, 4)
            corners = [f.getpixel(v) for v in ((0, 0), (3, 0), (0, 3), (3, 3))]
        assert corners == [(i, k, 1) for k in range(4)]
    assert {p.name for p in one.iterdir()} == {"p0.png", "p1.png", "p2.png"}


def test_a_teacher_draws_them_by_the_command_and_other_pictures_are_never_mixed_in(
    metadata, tmp_path, capsys
):
    words = ("draw", "geneval", "shapes", metadata, tmp_path / "out", "--steps", 1)
    code, out, err = called(capsys, *words, "--solver", "ddim")
    assert code == 0, err
    assert "images of 3 prompts" in out
    about = json.loads((tmp_path / "out.json").read_text())
    assert (about["steps"], about["seed"], about["source"]) == (1, 0, "shapes")
    cpu = torch.device("cpu")
    found = subject.teacher("shapes", cpu, "ddim").sampler(PROMPTS, 1, None)([PROMPTS[1]] * 4, 1)
    with Image.open(tmp_path / "out" / "00001" / "samples" / "00002.png") as f:
        assert f.size == (32, 32)
        assert f.getpixel((7, 9)) == tuple(found.images[2, :, 9, 7].tolist())
    before = (tmp_path / "out" / "00001" / "samples" / "00002.png").stat().st_mtime_ns
    assert called(capsys, *words, "--solver", "ddim")[0] == 0
    code, _, err = called(capsys, *words, "--solver", "ddim", "--seed", 1)
    assert (code, err.count("\n")) == (2, 1) and "give a new folder" in err
    after = (tmp_path / "out" / "00001" / "samples" / "00002.png").stat().st_mtime_ns
    assert before == after


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["genevl", "shapes", "{m}", "{o}"], ("benchmark 'genevl'", "geneval")),
        (["geneval", "shapes", "{w}/nowhere", "{o}"], ("geneval", "evaluation_metadata.jsonl")),
        (["geneval", "shapes", "{t}/p0.txt", "{o}"], ("geneval", "evaluation_metadata.jsonl")),
        (["geneval", "shapes", "{w}/odd", "{o}"], ("geneval", "odd", "line 1")),
        (["geneval", "shapes", "{w}/none", "{o}"], ("geneval", "no prompts", "none")),
        (["dpg", "shapes", "{m}", "{o}"], ("dpg", "no prompts")),
        (["dpg", "shapes", "{w}/empty", "{o}"], ("dpg", "a.txt")),
        (["dpg", "nowhere", "{t}", "{o}"], ("teacher 'nowhere'",)),
        (["dpg", "digits", "{t}", "{o}"], ("dpg", "labels of 10 classes")),
        (["dpg", "shapes", "{t}", "{o}", "--solver", "heunn"], ("--solver", "heun")),
        (["dpg", "shapes", "{t}", "{m}"], ("*/evaluation_metadata.jsonl",)),
        (["dpg", "shapes", "{t}", "{t}"], ("*/prompts", "prompts.json")),
        (["dpg", "shapes", "{t}", "{o}/a"], ("*/out/a",)),
        (["dpg", "shapes", "{t}", "{w}/notes"], ("*/notes.json",)),
        (["dpg", "shapes", "{t}", "{w}/bare"], ("*/bare.json",)),
        (["dpg", "shapes", "{t}", "."], (".", ".json")),
        (["dpg", "shapes", "{t}", "{w}/.."], ("*/..", ".json")),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    metadata, texts, tmp_path, capsys, words, line
):
    (tmp_path / "odd").write_text('["a cat"]\n')
    (tmp_path / "none").write_text("\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text(" \n")
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare.json").write_text("not JSON")
    before = sorted(tmp_path.rglob("*"))
    names = {"{m}": metadata, "{t}": texts, "{o}": tmp_path / "out", "{w}": tmp_path}
    for key, value in names.items():
        words = [w.replace(key, str(value)) for w in words]
    code, _, err = called(capsys, "draw", *words)
    assert code == 2, err
    refused_line(err, *line)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "notes.json").read_text() == '{"mine": 1}'
    assert (tmp_path / "bare.json").read_text() == "not JSON"


def test_a_call_that_was_cut_off_before_its_first_picture_goes_on(tmp_path):
    about = {"benchmark": "dpg", "seed": 0}
    record = benchmarks.check_folder(tmp_path / "out", about)
    benchmarks.write_record(record, about)
    assert benchmarks.check_folder(tmp_path / "out", about) == record == tmp_path / "out.json"
    with refused("*/out.json", "images"):
        benchmarks.check_folder(tmp_path / "out", {**about, "seed": 1})


def test_what_is_not_in_colour_is_refused(monkeypatch):
    monkeypatch.setattr(benchmarks, "picture_shape", lambda _: (3, 8, 32, 32))
    with refused("dpg", "3", "8", "32"):
        benchmarks.check_subject(
            Subject("teacher", load("shapes"), None, lambda *_: None, {}, None), "dpg"
        )
