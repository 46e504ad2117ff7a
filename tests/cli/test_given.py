"""Paths, folders and options that a user may give wrongly: each is refused in one line by name."""

import ast
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.cli.options import expand_home
from distill.data import images, prompts
from distill.data.cache import fill
from distill.evaluation import subject
from distill.files import stamps
from distill.planning.doctor import diagnose, pictures_for
from distill.publish import licence
from distill.report import curves, page
from students import Critic
from teachers import load
from teachers.catalogue.loading import find
from teachers.errors import intact
from teachers.guidance import SkipLayerGuided
from teachers.storage.files import home, read_json
from teachers.teacher import Pixels, Teacher
from tests.helpers.command_line import called
from tests.helpers.refusals import refused, refused_line

ROOT = Path(__file__).parents[2]
DEEP = 20_000 * "["


@pytest.fixture
def copy(tmp_path):
    """Copies a pipeline's folder; with the file named, so that it can be spoiled."""
    return lambda folder, *file: shutil.copytree(folder, tmp_path / "t").joinpath(*file)


def changed(path, **keys):
    """Write other values into a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


# ---- paths


@pytest.mark.parametrize(
    "opened",
    [
        load,
        find,
        lambda v: load(f"{v}.pkl"),
        lambda v: load(f"{v}.py:make"),
        licence.licence_of,
        subject.is_student,
        subject.usual_protocol,
        lambda v: subject.student(v, torch.device("cpu")),
        stamps,
        prompts.place_of_prompts,
        images.place_of_images,
        lambda v: images.place_of_images(f"{v}.tar"),
        lambda v: fill(None, SimpleNamespace(cache=v)),
        lambda v: expand_home(Path(v)),
    ],
)
def test_the_home_of_nobody_is_refused(opened):
    with refused("*", "~nosuch", "./~nosuch"):
        opened("~nosuch/x")


def test_a_path_at_home_is_expanded_and_others_are_left(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert home("~/x") == expand_home(Path("~/x")) == Path("/somewhere/x")
    assert home("a/~b") == expand_home(Path("a/~b")) == Path("a/~b")
    assert expand_home(None) is None


@pytest.mark.parametrize(
    "words",
    [
        ("sample", ".", "--out", "~nosuch/x.png"),
        ("report", ".", "--out", "~nosuch/x.html"),
        ("card", "~nosuch/run"),
        ("run", "digits/dmd2", "--out", "~nosuch/x"),
        ("plan", "digits/dmd2", "--json", "~nosuch/x"),
        ("convert", "~nosuch/x.pkl", "y"),
    ],
)
def test_commands_write_into_no_folder_that_is_called_as_a_users_home(
    words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, _, said = called(capsys, *words)
    assert code == 2
    refused_line(said, "*", "~nosuch", "./~nosuch")
    assert not list(tmp_path.iterdir())


def test_a_file_that_only_seems_to_be_writable_is_refused(tmp_path):
    from distill.files import check_writable

    with refused("--out", "proc/x.png"):
        check_writable(Path("/proc/x.png"), "--out")
    check_writable(tmp_path / "x.png", "--out")
    assert not list(tmp_path.iterdir())


def test_no_text_is_read_or_written_in_the_machines_own_encoding():
    binary, others = {"rb", "wb", "ab", "r+b"}, {"os", "Image", "tarfile"}
    wrong = []
    for path in [p for k in ("distill", "teachers", "students", "eval")
                 for p in (ROOT / k).rglob("*.py")]:  # fmt: skip
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or any(k.arg == "encoding" for k in call.keywords):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            given = [a.value for a in call.args if isinstance(a, ast.Constant)]
            bare = name == "read_text" and not call.args
            bare |= name == "write_text" and len(call.args) < 2
            if (
                name == "open"
                and getattr(getattr(call.func, "value", None), "id", "") not in others
            ):
                mode = [v for v in given if isinstance(v, str) and len(v) <= 3]
                bare = isinstance(call.func, ast.Name) or bool(mode)  # others open no file
                bare &= not binary.intersection(mode)
            if bare:
                wrong.append(f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)[:60]}")
    assert not wrong


# ---- what a teacher's folder says


def test_a_readme_of_odd_front_matter_still_states_its_licence():
    def read(front):
        return licence.parse_licence(f"---\n{front}\n---\n", {}, None, None)

    assert read("license: cc-by-nd-4.0\ndate: 2024-02-30").id == "cc-by-nd-4.0"
    assert read(f"x: {5000 * '['}\nlicense: 'cc-by-nd-4.0'  # all of it").forbids
    assert read("license: other\nlicense_name: no-derivatives\ny: [").label == "no-derivatives"
    assert read("license: null").id is None and read(5000 * "[").id is None


@pytest.mark.parametrize("entry", [["diffusers", None], ["diffusers", 5], 5, [None, "x"], []])
def test_a_part_that_the_index_does_not_name_as_one_is_refused(folders, copy, entry):
    changed(index := copy(folders("sd"), "model_index.json"), unet=entry)
    with refused("teacher '*/t'", "model_index.json"):
        load(str(index.parent))


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer", "vae"])
def test_a_family_without_a_part_that_it_draws_with_is_refused(folders, copy, part):
    index = copy(folders("sdxl"), "model_index.json")
    changed(index, **{part: [None, None]})
    with refused("teacher '*/t'", f"{part} is [null, null]", "StableDiffusionXLPipeline"):
        load(str(index.parent))
    tree = json.loads(index.read_text())
    del tree[part]
    index.write_text(json.dumps(tree))
    with refused("teacher '*/t'", "null", part):
        load(str(index.parent))


@pytest.mark.parametrize("size", [0, True, -8, None])
@pytest.mark.parametrize("name", ["eps", "sd"])
def test_pictures_of_no_size_are_refused(pipelines, folders, copy, name, size):
    folder = folders("sd") if name == "sd" else pipelines[name]
    changed(config := copy(folder, "unet", "config.json"), sample_size=size)
    with refused("teacher '*/t'", "unet/config.json", "sample_size", size):
        load(str(config.parents[1]))


@pytest.mark.parametrize("content", [None, DEEP, '{"a": ' + 5000 * "1" + "}"])
def test_json_that_cannot_be_read_is_refused(content, tmp_path):
    path = tmp_path / "model_index.json"
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    with refused("teacher 't'", "model_index.json"):
        read_json(path, "teacher 't'")


@pytest.mark.parametrize(
    ("part", "file", "content", "says"),
    [
        (
            "text_encoder",
            "config.json",
            None,
            ("teacher '*/t'", "text_encoder/config.json"),
        ),
        ("unet", "config.json", "[]", ("teacher '*/t'", "unet/config.json")),
        ("vae", "config.json", None, ("teacher '*/t'", "vae/config.json")),
        (
            "scheduler",
            "scheduler_config.json",
            None,
            ("teacher '*/t'", "scheduler_config.json"),
        ),
    ],
)
def test_a_parts_missing_or_wrong_config_is_named(folders, copy, part, file, content, says):
    path = copy(folders("sd"), part, file)
    path.unlink() if content is None else path.write_text(content)
    with refused(*says):
        load(str(path.parents[1]))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_whole_numbers_are_not_taken_for_weights(folders, copy, part):
    folder = copy(folders("sd"))
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    name = max(weights, key=lambda k: weights[k].numel())
    weights[name] = (weights[name] * 100).to(torch.int8)
    save_file(weights, file, metadata={"format": "pt"})
    with refused("teacher '*/t'", "quantised", name):
        load(str(folder))


def test_weights_that_are_not_finite_are_told_from_a_wrong_adapter(folders):
    teacher = load("digits")
    name, weight = next(iter(teacher.denoiser.named_parameters()))
    weight.data.flatten()[0] = torch.nan
    broken = [c for c in diagnose(teacher, pictures_for(teacher, None)) if c.verdict == "broken"]
    assert broken[0].remedy.startswith(f"weights: {name} hold NaN or infinity")
    teacher = load(folders("sd"))
    next(teacher.codec.pipe.vae.parameters()).data.fill_(torch.inf)
    broken = [c for c in diagnose(teacher, pictures_for(teacher, None)) if c.verdict == "broken"]
    assert broken[0].remedy.startswith("weights: vae.")


# ---- what a run's folder holds


@pytest.mark.parametrize(
    ("file", "read", "place"),
    [
        ("summary.json", page.read_summary, "*"),  # the run's folder
        ("speed.json", page.timings, "*/speed.json"),
        ("metrics.jsonl", curves.series, "*/metrics.jsonl"),
        ("reference.json", lambda run: curves.read(run / "reference.json"), "reference */*.json"),
        ("samples/final/prompts.json", page.prompts, "*/samples/final/prompts.json"),
    ],
)
def test_records_nested_without_end_are_damaged(file, read, place, tmp_path):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(DEEP)
    with refused(place, "damaged", file.rpartition("/")[2]):
        read(tmp_path)
    with refused(f"*/{file}", "damaged"), intact(tmp_path / file):
        json.loads(DEEP)


# ---- options and keys


def test_a_block_without_a_name_is_refused(pipelines):
    teacher = load(str(pipelines["eps"]))
    with refused("critic.blocks", "''"):
        Critic(teacher.denoiser, teacher.shape, None, [""])
    with refused("teacher.guidance.blocks", "block"):
        SkipLayerGuided(teacher.denoiser, 2.0, [""])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--n", 2, "--labels", "1,2,3"), ("--labels", "3", "--n", "2")),
        (("--labels", ""), ("--labels", "1")),
        (("--labels", "1,,2"), ("--labels", "1,,2", "3")),
        (("--labels", "1,12"), ("labels", "12", "0", "9")),
        (("--n", 10**12), ("Invalid value for '--n'", "100000")),
    ],
)
def test_labels_and_counts_that_cannot_be_drawn_are_refused(
    words, says, capsys, monkeypatch, tmp_path
):
    made = SimpleNamespace(counts=(1,)), Teacher(None, Pixels(10), (1, 8, 8))
    monkeypatch.setattr("students.export.folder.load_student", lambda _: made)
    code, _, said = called(capsys, "sample", tmp_path, "--out", tmp_path / "x.png", *words)
    assert code == 2
    refused_line(said, *says)
    assert not list(tmp_path.iterdir())
