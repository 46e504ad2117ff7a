"""Model cards: what they say, what the Hub makes of them, and when there may be none."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from distill import __main__ as cli
from distill.config.objectives import OBJECTIVES
from distill.config.recipe import Recipe
from distill.publish import card, licence
from distill.publish.licence import check_licence, licence_of
from distill.publish.papers import PAPERS
from distill.training import build
from teachers.catalogue.loading import find
from tests.helpers import command_line
from tests.helpers.cards import ROW
from tests.helpers.pushes import make_run, new_sessions
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree


def teacher_folder(path, readme=None, licence=None, index=None):
    path.mkdir(parents=True)
    (path / "model_index.json").write_text(json.dumps(index or {}))
    if readme is not None:
        (path / "README.md").write_text(f"---\n{readme}\n---\n# A model\n")
    if licence is not None:
        (path / "LICENSE").write_text(licence)
    return str(path)


@pytest.fixture
def run(tmp_path):
    """A measured run."""
    made = make_run(tmp_path / "run")
    summary = json.loads((made / "summary.json").read_text())
    few = {"1": {**ROW, "fd": 14.8, "steps": 1, "solver": "heun", "seeds": 1}}
    full = {**ROW, "fd": 0.138, "steps": 18, "solver": "heun", "seeds": 1}
    summary["metrics"] = {"teacher": full, "teacher_few": few, "student": {"1": ROW, "2": ROW}}
    (made / "summary.json").write_text(json.dumps(summary))
    return made


def front(text):
    return ModelCard(text).data.to_dict()


def of_teacher(tmp_path, source, **changes):
    """The card of a run on this teacher, and its front matter."""
    run = make_run(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", teacher=source)
    for name, content in changes.items():
        (run / "student" / f"{name}.json").write_text(json.dumps(content))
    text = card.card(run, "me/student").text
    return text, front(text)


# ---- what it says


def test_the_front_matter_is_what_the_hub_reads(run):
    made = card.card(run, "me/student")
    data = front(made.text)
    assert data["license"] == "apache-2.0"  # the embedded teacher's
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert {"fewstep", "dmd2"} <= set(data["tags"])
    assert data["inference"] == {"parameters": {"num_inference_steps": 1}}  # as good as 2
    assert "base_model" not in data  # the embedded teacher has no Hub id
    again = ModelCard(made.text).data.eval_results
    found = {(r.metric_name, r.metric_value) for r in again}
    assert ("Fréchet distance, 1 step", 0.2874) in found
    assert {r.dataset_name for r in again} == {"digits (1797 samples, 3 seeds)"}


def test_figures_come_with_protocol_seeds_and_spread(run):
    text = card.card(run).text
    assert "Protocol `digits`: 1797 samples, 3 seeds for the student and 1 for the teacher" in text
    assert "| student, 1 step | 1 | 0.287 ± 0.020 | 0.920 ± 0.000 | 0.978 ± 0.000 |".replace(
        " ± 0.000", ""
    ) in text.replace(" ± 0.000", "")
    assert "| teacher, 18 heun steps | 18 | 0.138 | 0.920 | 0.978 |" in text


def test_cost_guidance_data_and_method_are_said(run):
    text = card.card(run).text
    assert "2 CPU-hours on cpu" in text
    assert "guidance scale g = 2 (g = 1 + w; 1 is unguided)" in text
    assert "**Data**: `digits`" in text
    assert "4 steps of 8 samples, seed 0" in text
    assert "It is trained for 1 or 2 steps" in text
    assert "arxiv.org/abs/2405.14867" in text and "eprint = {2405.14867}" in text


@pytest.mark.parametrize(
    ("pipeline", "version"),
    [
        ("StableDiffusionXLPipeline", "0.36"),
        ("ConsistencyModelPipeline", "0.36"),
        ("ZImagePipeline", "0.39"),
        ("SanaPipeline", "0.39"),
    ],
)
def test_the_first_diffusers_that_draws_it_is_said(pipeline, version):
    sidecar = {"steps": [4], "teacher": "shapes", "recipe": {}}
    facts = card.Facts({"_class_name": pipeline}, sidecar)
    assert f"diffusers {version} or later draws it" in card.method(facts)


def test_hours_of_all_processes_are_counted():
    summary = {"wall_s": 1800.0, "processes": 8, "device": "cuda (H100, 4 threads)"}
    assert card.cost(summary).startswith("4 GPU-hours on cuda (H100, 4 threads), 8 processes")


@pytest.mark.slow
def test_the_snippet_is_six_lines_that_run(tmp_path, pipelines):
    """The model card's snippet runs in a process that has diffusers alone."""
    from students import schedulers
    from students.export.folder import export
    from teachers import load

    teacher = load(str(pipelines["edm"]), null_label=10)
    export(
        schedulers.student(teacher, 2),
        teacher,
        tmp_path / "student",
        {"objective": {"name": "sid"}},
    )
    text = card.draft(tmp_path / "student")
    code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]
    assert len(code.splitlines()) == 6
    code = code.replace("path/to/this/folder", str(tmp_path / "student"))
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "sample.png").stat().st_size > 0
    assert str(pipelines["edm"]) not in text  # this machine's folders stay here


def test_a_text_pipelines_card_prompts_it_unguided(tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "x"]}
    text, data = of_teacher(tmp_path, "digits", model_index=index)
    assert data["pipeline_tag"] == "text-to-image"
    assert data["inference"]["parameters"] == {"num_inference_steps": 2, "guidance_scale": 1.0}
    assert 'pipe("a lighthouse at dusk"' in text and "guidance_scale=1.0" in text
    assert len(re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1].splitlines()) == 6


def test_a_student_that_reads_the_guidance_scale_is_prompted_with_one():
    index = {"_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "x"]}
    guidance = {"scale": [1.0, 5.0], "sampling_scale": 2.0}
    sidecar = {"steps": [1], "teacher": "shapes", "recipe": {"teacher": {"guidance": guidance}},
               "guidance": {"range": [1.0, 5.0], "scale": 2.0, "input": True}}  # fmt: skip
    facts = card.Facts(index, sidecar)
    assert card.guidance_arguments(facts) == {"guidance_scale": 2.0}
    assert "`guidance_scale` from 1 to 5" in card.training(facts)
    sidecar["guidance"]["input"] = False
    facts = card.Facts(index, sidecar)
    assert card.guidance_arguments(facts) == {"guidance_scale": 1.0}


def test_the_newest_grid_at_the_most_steps_lies_beside_the_card(run):
    for name in ("step-000002-at-2", "step-000009-at-1", "step-000009-at-2"):
        (run / "samples" / f"{name}.png").write_text(name)
    made = card.card(run)
    assert made.grid.name == "step-000009-at-2.png"
    assert "(grid.png)" in made.text
    for picture in (run / "samples").iterdir():
        picture.unlink()
    assert "grid.png" not in card.card(run).text


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_its_paper(name):
    paper = PAPERS[name]
    assert f"arXiv:{paper.arxiv}" in sys.modules[OBJECTIVES[name].__module__].__doc__
    assert paper.bibtex(name).count("{") == paper.bibtex(name).count("}")
    assert f"year = {{{paper.year}}}" in paper.bibtex(name)


# ---- licences


def test_a_hub_teacher_is_named_as_the_base_model(tmp_path, monkeypatch):
    readme = "license: other\nlicense_name: their-terms\nlicense_link: LICENSE.md"
    there = teacher_folder(tmp_path / "t", readme)
    monkeypatch.setattr(licence, "download_terms", lambda source: Path(there))
    text, data = of_teacher(tmp_path, "owner/model")
    assert (data["base_model"], data["base_model_relation"]) == ("owner/model", "finetune")
    assert (data["license"], data["license_name"]) == ("other", "their-terms")
    assert data["license_link"] == "https://huggingface.co/owner/model/blob/main/LICENSE.md"
    assert "student of owner/model" in text


def test_a_lora_is_an_adapter_of_its_base(tmp_path, monkeypatch):
    there = teacher_folder(tmp_path / "t", "license: mit")
    monkeypatch.setattr(licence, "download_terms", lambda source: Path(there))
    run = make_run(tmp_path / "run", teacher="owner/model")
    (run / "lora").mkdir()
    (run / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    data = front(card.card(run).text)
    assert data["base_model_relation"] == "adapter"
    assert "lora" in data["tags"]


@pytest.mark.parametrize(
    ("readme", "file", "expected"),
    [
        ("license: creativeml-openrail-m", "MIT License", "creativeml-openrail-m"),
        (None, "Apache License\n   Version 2.0, January 2004", "apache-2.0"),
        (None, "CreativeML Open RAIL++-M License", "openrail++"),
        (None, "Terms of our own", "other"),
        ("license: [mit, cc-by-nc-nd-4.0]", None, "cc-by-nc-nd-4.0"),
        ("tags: [x]", None, None),
        ("license: [unclosed", None, None),
        (None, None, None),
    ],
)
def test_a_licence_is_read_from_readme_then_file(tmp_path, readme, file, expected):
    assert licence_of(teacher_folder(tmp_path / "t", readme, file)).id == expected


def test_an_unstated_licence_is_said_to_be_unstated(tmp_path):
    text, data = of_teacher(tmp_path, teacher_folder(tmp_path / "t"))
    assert "license" not in data
    assert "states no licence; ask its owner" in text


@pytest.mark.parametrize(
    "readme",
    [
        "license: cc-by-nd-4.0", "license: cc-by-nc-nd-3.0",
        "license: other\nlicense_name: no-derivatives", "license: other\nlicense_name: CC BY ND",
        "license: other\nlicense_name: All Rights Reserved",
    ],
)  # fmt: skip
def test_a_licence_that_forbids_derivatives_stops_the_card_unless_a_reason_is_given(
    tmp_path, readme
):
    source = teacher_folder(tmp_path / "t", readme)
    with refused("teacher '*/t'", "forbids"):
        check_licence(source)
    with refused("teacher '*/t'", "forbids"):
        check_licence(source, "  ")
    run = make_run(tmp_path / "run", teacher=source)
    with refused("teacher '*/t'", "forbids"):
        card.card(run)
    text = card.card(run, licence_override="permission of 3 May").text
    assert "shared because: permission of 3 May" in text


@pytest.mark.parametrize(
    "name", ["cc-by-nc-4.0", "cc-by-sa-4.0", "openrail++", "mit", "bsd", "wtfpl"]
)
def test_other_licences_do_not_stop_it(tmp_path, name):
    assert check_licence(teacher_folder(tmp_path / "t", f"license: {name}")).id == name


def test_a_recipe_may_give_the_reason(tmp_path):
    run = make_run(
        tmp_path / "run", teacher=teacher_folder(tmp_path / "t", "license: cc-by-nd-4.0")
    )
    path = run / "student" / "fewstep.json"
    sidecar = json.loads(path.read_text())
    sidecar["recipe"]["export"] = {"licence_override": "we are the owners"}
    path.write_text(json.dumps(sidecar))
    assert "we are the owners" in card.card(run).text


def test_a_run_is_refused_before_anything_is_built_unless_a_reason_is_given(
    tmp_path, pipelines, monkeypatch, capsys
):
    source = Path(teacher_folder(tmp_path / "t", "license: cc-by-nd-4.0"))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(recipe_tree("dmd2", source)))

    class Built(Exception):
        pass

    def networks(recipe, out, resume):
        raise Built(recipe.export.licence_override)

    monkeypatch.setattr(build, "networks", networks)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["distill", "run", str(recipe), "--out", str(tmp_path / "o")])
        cli.main()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1
    assert "its licence (cc-by-nd-4.0) forbids sharing what is derived" in err
    assert "--licence-override REASON, or in a recipe's export.licence_override" in err
    assert not (tmp_path / "o").exists()
    reason = "ours: by letter, 3 May"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Built, match=reason):
        words = ["run", str(recipe), "--out", str(tmp_path / "o"), "--licence-override", reason]
        patch.setattr(sys, "argv", ["distill", *words])
        cli.main()


def test_the_licence_of_the_weaker_teacher_that_guides_stops_a_run_as_well(tmp_path, pipelines):
    weaker = teacher_folder(tmp_path / "t", "license: cc-by-nd-4.0")
    tree = recipe_tree("sid", pipelines["edm"])
    tree["teacher"]["guidance"] = {"scale": 2, "kind": "auto", "weaker": weaker}
    with refused("teacher '*/t'", "cc-by-nd-4.0", weaker):
        build.build(Recipe.check(tree), tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_the_licence_of_the_weaker_teacher_that_guided_stops_the_card_as_well(tmp_path):
    weaker = teacher_folder(tmp_path / "t", "license: cc-by-nd-4.0")
    run = make_run(tmp_path / "run")
    path = run / "student" / "fewstep.json"
    sidecar = json.loads(path.read_text())
    sidecar["recipe"]["teacher"] = {"guidance": {"scale": 2, "kind": "auto", "weaker": weaker}}
    path.write_text(json.dumps(sidecar))
    with refused("teacher '*/t'", "cc-by-nd-4.0", weaker):
        card.card(run)
    text = card.card(run, licence_override="permission of 3 May").text
    said = "that guided it (cc-by-nd-4.0) forbids derivatives; the student is shared because:"
    assert f"{said} permission of 3 May." in text


@pytest.mark.parametrize(
    ("front", "kept"), [("license: cc-by-nd-4.0", "cc-by-nd-4.0"), ("", "mit")]
)
def test_a_hub_teachers_licence_is_known_before_it_is_downloaded_and_offline(
    hub,
    tmp_path,
    monkeypatch,
    front,
    kept,
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    readme = f"---\n{front}\n---\n# A model\n".encode()
    files = {"README.md": readme, "LICENSE": b"MIT License", "model_index.json": b"{}"}
    hub.create("owner/model", **files)
    assert licence_of("owner/model").id == kept
    assert not hub.count("model_index.json")
    assert licence_of("owner/other") == licence.Licence()  # of which nothing is known
    folder = find("owner/model")
    assert {p.name for p in folder.iterdir()} == set(files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    new_sessions()
    asked = len(hub.seen)
    assert licence_of("owner/model").id == kept
    assert len(hub.seen) == asked


# ---- the command


def called(capsys, *words):
    return command_line.called(capsys, "card", *words)


def test_the_command_prints_the_card_or_writes_it(run, tmp_path, capsys):
    code, out, err = called(capsys, run)
    assert (code, err) == (0, "")
    assert yaml.safe_load(out.split("---")[1])["library_name"] == "diffusers"
    path = tmp_path / "x.md"
    assert called(capsys, run, "--out", path)[:2] == (0, f"wrote {path}\n")
    assert path.read_text() == out


def changed(name, **entries):
    """Writes entries into a JSON file of the run."""

    def damage(run):
        content = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(content | entries))

    return damage


SUMMARY, SIDECAR = "summary.json", "student/fewstep.json"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda run: (run / "summary.json").unlink(), "not finished"),
        (lambda run: (run / "summary.json").write_text("{"), "not valid JSON"),
        (
            lambda run: (run / "student" / "fewstep.json").write_text("{}"),
            "fewstep.json is damaged",
        ),
        (lambda run: (run / "recipe.yaml").unlink(), "no recipe.yaml there"),
        (changed(SUMMARY, wall_s="x"), "summary.json: damaged"),
        (changed(SUMMARY, metrics={"student": None}), "summary.json: damaged"),
        (changed(SUMMARY, metrics={"student": {}}), "summary.json: damaged"),
        (changed(SUMMARY, metrics={"teacher": ROW}), "summary.json: damaged; it lacks 'student'"),
        (changed(SUMMARY, metrics={"student": {"1": ROW | {"spread": 3}}}), "summary.json: dam"),
        (changed(SUMMARY, metrics=[1]), "summary.json: damaged"),
        (changed(SIDECAR, steps=[True]), "fewstep.json is damaged"),
        (changed(SIDECAR, steps=[0]), "fewstep.json is damaged"),
        (changed(SIDECAR, steps=["2"]), "fewstep.json is damaged"),
        (changed(SIDECAR, teacher=None), "fewstep.json is damaged"),
        (changed(SIDECAR, recipe={"teacher": 3}), "fewstep.json is damaged"),
    ],
)
def test_a_run_that_is_not_whole_is_refused_in_one_line(run, capsys, damage, says):
    damage(run)
    code, out, err = called(capsys, run)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err


@pytest.mark.parametrize(("counts", "terminal", "says"), [
    ([2, 4], 0.5, True), ([1, 2, 4], 0.5, False), ([2, 4], None, False),
])  # fmt: skip
def test_a_student_without_a_schedule_of_one_step_says_what_happens_there(
    counts, terminal, says, tmp_path
):
    run = make_run(tmp_path / "run")
    path = run / "student" / "fewstep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "steps": counts}))
    (run / "student/scheduler").mkdir()
    config = {"shift_terminal": terminal}
    (run / "student/scheduler/scheduler_config.json").write_text(json.dumps(config))
    text = card.card(run).text
    assert ("IndexError" in text) == says
    *rest, last = map(str, counts)
    assert f"Other step counts than {', '.join(rest)} and {last} " in text
