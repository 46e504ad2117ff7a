"""The end of a run: what fails beside the student costs nothing else, and is said and noted."""

import json

import pytest
import torch
import yaml

from distill import __version__
from distill.config.recipe import Recipe
from distill.evaluation import finish
from distill.training import build, engine, preflight
from students import schedulers
from students.export import folder as exporting
from students.export import lora_files
from students.export.folder import ExportError
from students.lora import Adapter
from teachers import UserError, load
from tests.helpers import families
from tests.helpers.command_line import called
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree

EXTRAS = {"student/README.md": "draft", "samples/final": "save_pictures", "report.html": "report"}


@pytest.fixture
def unchecked(monkeypatch):
    """Exports without the check in another process, which has tests of its own."""
    monkeypatch.setattr(exporting, "verify", lambda *_: None)


@pytest.fixture
def recipe(pipelines, tmp_path):
    tree = recipe_tree("consistency", pipelines["edm"], steps=2)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def failing(*_, **__):
    raise ZeroDivisionError("a part that fails\nand a second line")


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize("broken", [*[[k] for k in EXTRAS], [*EXTRAS]], ids=" ".join)
def test_what_fails_beside_the_student_costs_nothing_else(
    broken, recipe, unchecked, monkeypatch, tmp_path, capsys
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        for name in broken:
            patch.setattr(finish, EXTRAS[name], failing)
        code, said, err = called(capsys, "run", recipe, "--out", out)
    assert code == 0
    line = "ZeroDivisionError: a part that fails"
    assert summary_of(out)["failed"] == dict.fromkeys(broken, line)
    for name in broken:
        assert f"distill: {name}: failed: {line}\n" in err
    assert f"not made: {', '.join(broken)}" in err and "Traceback" not in err
    assert "Traceback" in (out / "failed.txt").read_text()
    assert (out / "student" / "unet").is_dir() and "student in" in said
    kept = {"student/README.md", "samples/final", "report.html"} - {*broken}
    assert all((out / name).exists() for name in kept)
    assert not any((out / name).is_file() for name in broken)
    # and it can be tried again
    code, _, err = called(capsys, "run", recipe, "--out", out, "--resume")
    assert code == 0 and "failed" not in err
    assert summary_of(out)["failed"] == {} and not (out / "failed.txt").exists()
    assert all((out / name).exists() for name in EXTRAS)


def test_the_students_card_is_written_again_with_its_figures(
    recipe, unchecked, monkeypatch, tmp_path, capsys
):
    out, given = tmp_path / "run", []
    monkeypatch.setattr(finish, "draft", lambda _, summary=None: given.append(summary) or "card")
    monkeypatch.setattr(finish, "report", lambda _: None)
    called(capsys, "run", recipe, "--out", out)
    assert given[0] is None and given[1] == {**summary_of(out), "failed": {}}
    assert (out / "student" / "README.md").read_text() == "card"


def test_a_run_whose_measuring_failed_keeps_all_else_and_ends_in_one(
    recipe, unchecked, monkeypatch, tmp_path, capsys
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(finish, "measure_all", failing)
        code, said, err = called(capsys, "run", recipe, "--out", out)
    assert code == 1 and "distill: figures: failed: ZeroDivisionError" in err
    assert "not measured: the measurement failed" in said
    assert not finish.finished(out)  # a benchmark does not count it
    assert all((out / name).exists() for name in EXTRAS)
    assert summary_of(out)["steps"] == 2
    code, *_ = called(capsys, "run", recipe, "--out", out, "--resume")
    assert code == 0 and finish.finished(out)


def test_an_export_that_fails_is_one_line_and_costs_no_training(
    recipe, monkeypatch, tmp_path, capsys
):
    out = tmp_path / "run"

    def other(*_):
        raise ExportError("at 1 steps the exported pipeline differs")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "verify", other)
        code, _, err = called(capsys, "run", recipe, "--out", out)
    assert code == 1 and err.count("\n") == 1
    assert "student: at 1 steps the exported pipeline differs; nothing is lost" in err
    assert not (out / "student").exists() and (out / "checkpoints").is_dir()
    monkeypatch.setattr(exporting, "verify", lambda *_: None)
    code, said, _ = called(capsys, "run", recipe, "--out", out, "--resume")
    assert code == 0 and "step 2/2" not in said  # no step was taken again
    assert (out / "student").is_dir()


def test_grids_and_figures_that_fail_while_training_stop_no_run(
    pipelines, unchecked, monkeypatch, tmp_path, capsys
):
    tree = recipe_tree("consistency", pipelines["edm"], steps=3, sample_every=1)
    run = build.build(Recipe.check(tree), tmp_path / "run")
    run.engine.evaluate, run.engine.evaluate_every = failing, 2
    monkeypatch.setattr(engine, "save_samples", failing)
    before = [p.clone() for p in run.engine.ema.params]
    run.engine.train()
    assert run.engine.step == 3
    assert run.engine.extras.failed.keys() == {"samples", "figures while training"}
    assert capsys.readouterr().err.count("samples: failed") == 1  # of three
    after = run.engine.ema.params
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_trackers_that_cannot_be_closed_cost_no_summary(
    pipelines, unchecked, monkeypatch, tmp_path
):
    run = build.build(Recipe.check(recipe_tree("ect", pipelines["edm"], steps=1)), tmp_path / "run")
    run.engine.train()
    monkeypatch.setattr(run.engine.accelerator, "end_training", failing)
    assert finish.finish(run)["failed"].keys() == {"trackers"}
    assert summary_of(run.out)["failed"].keys() == {"trackers"}


def test_one_picture_that_fails_leaves_the_others(pipelines, unchecked, monkeypatch, tmp_path):
    run = build.build(Recipe.check(recipe_tree("ect", pipelines["edm"], steps=1)), tmp_path / "run")
    run.engine.train()
    real = finish.save_samples

    def save(images, prompts, path):
        if path.name == "teacher-1.png":
            raise OSError(28, "No space left on device")
        real(images, prompts, path)

    monkeypatch.setattr(finish, "save_samples", save)
    failed = finish.finish(run)["failed"]
    assert failed.keys() == {"samples/final/teacher-1.png"}
    names = {p.name for p in (tmp_path / "run/samples/final").glob("*.png")}
    assert names == {"teacher-18.png", "student-1.png"}


# ---- LoRA files


@pytest.fixture
def adapted(tmp_path):
    teacher = load(str(families.build("sd", tmp_path / "teacher")))
    student = schedulers.student(teacher, 1, None, True, Adapter(rank=2)).eval()
    return student, teacher


def test_one_lora_format_that_fails_leaves_the_other(adapted, unchecked, monkeypatch, tmp_path):
    exporting.export(*adapted, tmp_path / "student", {})
    tried = []

    def written(files, *_):
        tried.append([f.path.name for f in files])
        if lora_files.COMFYUI in tried[-1]:
            raise ExportError("stock diffusers could not use comfyui_lora.safetensors")
        for file in files:
            file.path.touch()

    monkeypatch.setattr(lora_files, "write", written)
    failed = {}
    out = tmp_path / "lora"
    lora_files.export_lora(*adapted, tmp_path / "student", out, failed=failed.__setitem__)
    assert failed.keys() == {lora_files.COMFYUI}
    assert {p.name for p in out.iterdir()} == {lora_files.DIFFUSERS, "scheduler"}
    assert tried == [[lora_files.DIFFUSERS, lora_files.COMFYUI], *[[n] for n in tried[0]]]


def test_what_stock_diffusers_reads_of_the_files_is_looked_at_before_training(adapted):
    assert lora_files.rehearse(*adapted) == {}
    assert [*lora_files.forms(*adapted)[0]] == [lora_files.DIFFUSERS, lora_files.COMFYUI]


def test_a_format_that_a_network_has_not_is_left_out_and_said_before_training(
    adapted, monkeypatch, capsys
):
    def none(*_):
        raise UserError("single file: the UNet's 'x' has no place in LDM's UNet")

    monkeypatch.setattr(lora_files, "to_kohya", none)
    recipe = Recipe.check(recipe_tree("ect", "digits"))
    preflight.rehearse_end(recipe, *adapted)
    err = capsys.readouterr().err
    assert f"lora/{lora_files.COMFYUI} will not be written (single file: the UNet's 'x'" in err
    assert [*lora_files.forms(*adapted)[0]] == [lora_files.DIFFUSERS]


def test_lora_keys_that_diffusers_reads_otherwise_are_refused_before_training(adapted, monkeypatch):
    whole = lora_files.to_kohya

    def fewer(lora, names):
        made = whole(lora, names)
        layer = next(iter(made)).partition(".")[0]
        return {k: v for k, v in made.items() if not k.startswith(layer)}

    monkeypatch.setattr(lora_files, "to_kohya", fewer)
    with refused("lora/comfyui_lora.safetensors", "diffusers"):
        lora_files.rehearse(*adapted)


# ---- pages


def test_a_missing_package_of_the_pages_is_named_before_training(pipelines, monkeypatch, tmp_path):
    from distill.report import page

    def missing(run):
        raise ModuleNotFoundError("No module named 'jinja2'", name="jinja2")

    monkeypatch.setattr(page, "render", missing)
    with refused("jinja2", "pip install"):
        build.build(Recipe.check(recipe_tree("ect", pipelines["edm"])), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_page_that_will_fail_is_said_before_training_and_stops_nothing(
    pipelines, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(preflight, "draft", failing)
    build.build(Recipe.check(recipe_tree("ect", pipelines["edm"])), tmp_path / "run")
    assert "the run's card or report will fail: ZeroDivisionError" in capsys.readouterr().err


def test_the_pages_of_every_kind_of_teacher_are_rehearsed_without_a_word(
    adapted, pipelines, capsys
):
    preflight.write_pages(Recipe.check(recipe_tree("ect", "digits")), *adapted)
    teacher = load(str(pipelines["edm"]), null_label=10)
    preflight.rehearse_end(
        Recipe.check(recipe_tree("ect", pipelines["edm"])), schedulers.student(teacher, 2), teacher
    )
    assert capsys.readouterr().err == ""


# ---- what the loss compared


@pytest.mark.parametrize(("name", "features"), [("mmd", "backbone.mid_block"), ("ect", None)])
def test_the_summary_and_the_page_name_the_features_in_the_loss(
    name, features, pipelines, unchecked, tmp_path
):
    run = build.build(Recipe.check(recipe_tree(name, pipelines["edm"], steps=1)), tmp_path / "run")
    run.engine.train()
    finish.finish(run)
    recorded, page = summary_of(run.out).get("loss_features"), (run.out / "report.html").read_text()
    if features is None:
        assert recorded is None and "Features in the loss" not in page
    else:
        assert features in recorded and "σ/α = 0.1" in recorded
        assert "Features in the loss" in page and features in page


# ---- the summary's versions


def test_a_checkout_that_is_not_installed_says_its_own_version(
    pipelines, unchecked, monkeypatch, tmp_path
):
    from importlib import metadata

    real = metadata.version

    def version(name):
        if name == "fewstep":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(finish, "version", version)
    run = build.build(Recipe.check(recipe_tree("ect", pipelines["edm"], steps=1)), tmp_path / "run")
    run.engine.train()
    assert finish.finish(run)["versions"]["fewstep"] == __version__
