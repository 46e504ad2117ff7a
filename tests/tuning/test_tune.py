"""`distill tune` on a tiny pipeline: what it leaves, what it refuses, and how it goes on."""

import fcntl
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from distill.data.prompts import list_prompts
from distill.publish.card import card
from distill.training import run_folder
from distill.training.run_folder import write_recipe
from distill.tuning import pictures as lesson
from distill.tuning import tune as tuning
from distill.tuning.pictures import OWN_PROMPTS
from distill.tuning.recipes import Places, Settings, student_recipe, teacher_recipe
from distill.tuning.student import tunable
from students.export.lora_files import DIFFUSERS, TURBO
from teachers.errors import UserError, note, notes_once
from tests.helpers.command_line import called

SMALL = ["--steps", 2, "--teacher-steps", 2, "--samples", 6]
ROW = {
    "steps_kept": 0.96,
    "concept_gained": {"student": 0.8, "teacher": 0.9},
    "distances": {"before": 3.0, "after": 0.2, "undistilled": 3.0, "floor": 0.1},
    "by_set": {},
    "teacher_equivalent_steps": 4,
}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(lesson, "PRIOR", 4)
    monkeypatch.setattr(lesson, "OWN_PROMPTS", 30)
    monkeypatch.setattr(lesson, "NEUTRAL_PROMPTS", 10)


@pytest.mark.slow
def test_a_student_is_tuned_to_the_tuned_teacher(student, pictures, few, tmp_path, capsys):
    """The command on a tiny Stable Diffusion: both runs, their LoRA files, figures, `--resume`."""
    out = tmp_path / "tuned"
    words = ["tune", student, "--data", pictures, "--out", out, *SMALL]
    code, said, _ = called(capsys, *words)
    assert code == 0
    assert "steps kept" in said and "concept gained" in said and "at 1 step:" in said
    figures = json.loads((out / "tune.json").read_text())
    assert (figures["method"], figures["pictures"]) == ("teacher", 20)
    assert figures["features"] == "pixels pooled to 8×8"
    row = figures["students"]["1"]
    d = row["distances"]
    if d["undistilled"] > d["floor"]:
        kept = 1 - (d["after"] - d["floor"]) / (d["undistilled"] - d["floor"])
        assert row["steps_kept"] == pytest.approx(kept)
    learned = tmp_path / "tuned-teacher"
    for folder in (learned, out):
        assert json.loads((folder / "summary.json").read_text())["failed"] == {}
    file = learned / "lora" / DIFFUSERS
    assert any(v.abs().max() > 0 for k, v in load_file(file).items() if "lora_B" in k)
    # the LoRA of both on the plain base, and the student's alone, as of any run with a user's LoRA
    both, alone = (load_file(out / "lora" / n) for n in (DIFFUSERS, TURBO[DIFFUSERS]))
    assert both.keys() == alone.keys()
    assert {len(v) for k, v in both.items() if "lora_A" in k} == {4}
    assert (out / "student/model_index.json").is_file()
    assert called(capsys, *words)[0] == 2  # the folders hold runs
    code, again, _ = called(capsys, *words, "--resume")
    assert (code, again.splitlines()[-2:]) == (0, said.splitlines()[-2:])


@pytest.fixture
def trained(monkeypatch, few):
    """The runs that would be trained, by their folders' names; they end at once."""
    names = {}

    def train(recipe, out):
        names[out.name] = recipe
        (out / "student").mkdir(parents=True)
        write_recipe(recipe, out)
        metrics = {"student": {"1": {"fd": 4.5, "accuracy": 0.9}}}
        summary = {"steps": 2, "wall_s": 1.0, "metrics": metrics}
        (out / "summary.json").write_text(json.dumps(summary))

    def measured(judged):
        assert judged.recipe.teacher.adapters[-1].file.endswith(DIFFUSERS)
        return {"features": "none", "samples": 6, "teacher_steps": 2, "students": {"1": ROW}}

    monkeypatch.setattr(tuning, "train", train)
    monkeypatch.setattr(tuning, "measured", measured)
    return names


def test_what_the_command_prints_and_trains(student, pictures, trained, tmp_path, capsys):
    out = tmp_path / "tuned"
    words = ["tune", student, "--data", pictures, "--out", out, *SMALL]
    code, said, _ = called(capsys, *words)
    assert code == 0
    assert said.splitlines() == [
        f"the teacher learns 20 pictures, in {out}-teacher",
        f"the student is tuned (teacher), in {out}",
        "comparing the student with the tuned teacher",
        "at 1 step: steps kept 0.96 (1 as the teacher in 2 steps, 0 as undistilled), worth the "
        "tuned teacher's 4; concept gained 0.80 (the teacher 0.90)",
        f"student in {out}/student, figures in {out}/tune.json",
    ]
    assert list(trained) == ["tuned-teacher", "tuned"]
    recipe = trained["tuned"]
    assert recipe.teacher.guidance == 2
    assert [v.file for v in recipe.teacher.adapters] == [f"{out}-teacher/lora/{DIFFUSERS}"]
    assert recipe.student.init == str(student / "student")
    figures = json.loads((out / "tune.json").read_text())
    assert figures["quality"]["after"] == {"1": {"fd": 4.5, "accuracy": 0.9}}
    assert figures["students"]["1"] == ROW


def test_the_figures_are_on_the_card_and_on_the_page(student, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(student, run)
    (run / "summary.json").write_text(json.dumps({"steps": 2, "wall_s": 1.0, "metrics": {}}))
    (run / "metrics.jsonl").write_text('{"step": 1, "student/loss": 0.5}\n')
    unknown = {**ROW, "teacher_equivalent_steps": None, "steps_kept": None}
    figures = {"method": "teacher", "pictures": 20, "teacher_steps": 25,
               "students": {"1": ROW, "2": unknown}}  # fmt: skip
    (run / "tune.json").write_text(json.dumps(figures))
    tuning.write_pages(run)
    assert capsys.readouterr().err == ""
    text = (run / "student" / "README.md").read_text()
    assert "| 1 step | 0.96 | 4 | 0.80 | 0.90 |" in text and "on 20 pictures" in text
    assert "| 2 steps | unknown | more than 25 | 0.80 | 0.90 |" in text
    page = (run / "report.html").read_text()
    assert "<td>1 step</td><td>0.96</td><td>4</td>" in page and "tuned teacher in 25 steps" in page
    assert "## Tuning" in card(run).text
    (run / "tune.json").write_text(json.dumps({**figures, "students": {"1": {}}}))
    tuning.write_pages(run)
    assert "tune.json: damaged" in capsys.readouterr().err


def test_a_note_is_written_once(capsys):
    with notes_once():
        for line in ("a: 72 of 72 pairs", "b: 1 of 1 pairs", "a: 72 of 72 pairs"):
            note(line)
    note("a: 72 of 72 pairs")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"distill: {k}" for k in ("a: 72 of 72 pairs", "b: 1 of 1 pairs")] + lines[:1]


def test_what_was_stopped_goes_on(student, pictures, trained, tmp_path, monkeypatch):
    """Stopped between the two runs, and then after the second: nothing is trained twice."""
    places = Places(tmp_path / "tuned", pictures)
    settings = Settings(method="plain", steps=2, teacher_steps=2)
    train = tuning.train

    def interrupted(recipe, out):
        if trained:
            raise KeyboardInterrupt
        train(recipe, out)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tuning, "train", interrupted)
        tuning.tune(str(student), places, settings)
    assert list(trained) == ["tuned-teacher"]
    trained.clear()
    figures = tuning.tune(str(student), places, settings, resume=True)
    assert list(trained) == ["tuned"] and figures["method"] == "plain"
    trained.clear()
    assert tuning.tune(str(student), places, settings, resume=True) == figures
    other = Places(tmp_path / "other", pictures, tmp_path / "tuned-teacher")
    tuning.tune(str(student), other, Settings(method="plain", steps=1))
    assert list(trained) == ["other"]  # on the teacher that there was
    with pytest.raises(UserError) as error:  # the same folders, other settings
        changed = Settings(method="plain", steps=2, teacher_steps=2, teacher_rate=0.5)
        tuning.tune(str(student), places, changed, resume=True)
    assert error.value.key == "--resume"


def test_figures_of_another_number_of_pictures_are_no_answer(
    student, pictures, trained, tmp_path, monkeypatch
):
    places, settings = Places(tmp_path / "tuned", pictures), Settings(steps=2, teacher_steps=2)
    drawn = []
    measured = tuning.measured
    monkeypatch.setattr(
        tuning, "measured",
        lambda judged: drawn.append(judged.samples) or {**measured(judged), "samples": drawn[-1]},
    )  # fmt: skip
    for samples in (4, 4, 8):
        tuning.tune(str(student), places, settings, samples=samples, resume=bool(drawn))
    assert drawn == [4, 8]
    (places.out / "tune.json").write_text("{cut off")
    assert tuning.tune(str(student), places, settings, samples=8, resume=True)["samples"] == 8


def test_a_folder_at_work_is_refused_before_anything_is_written(student, pictures, tmp_path):
    places = Places(tmp_path / "tuned", pictures)
    places.teacher.mkdir()
    with (places.teacher / run_folder.LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for resume in (False, True):
            with pytest.raises(UserError) as error:
                tuning.tune(str(student), places, Settings(), resume=resume)
            assert error.value.key == "--out"
    assert [p.name for p in places.teacher.iterdir()] == [run_folder.LOCK]


def test_a_student_of_one_step_is_not_tuned_by_the_anchor(student, pictures, trained, tmp_path):
    places = Places(tmp_path / "tuned", pictures)
    with pytest.raises(UserError) as error:
        tuning.tune(str(student), places, Settings(method="anchor"))
    assert error.value.key == "--method" and "--method teacher" in str(error.value)
    assert not trained and not places.out.exists() and not places.teacher.exists()


def test_the_recipes_of_the_methods(student, pictures, tmp_path):
    places = Places(tmp_path / "out", pictures)
    source = tunable(str(student))
    first = teacher_recipe(source, places, Settings(teacher_steps=7, teacher_rate=0.5), 9)
    assert (first.objective["name"], first.train.steps, first.teacher.guidance) == (
        "finetune", 7, 1.0,
    )  # fmt: skip
    assert first.players["student"].lr == 0.5
    assert first.objective["known_from"] == 9
    found = {
        m: student_recipe(source, places, Settings(method=m, overrides=["train.batch=3"]), 9)
        for m in ("teacher", "anchor", "plain")
    }
    assert {r.train.batch for r in found.values()} == {3}
    assert {r.train.steps for r in found.values()} == {4}  # twice the student's two
    assert {k: r.objective["name"] for k, r in found.items()} == {
        "teacher": "dmd2-anchored", "anchor": "finetune", "plain": "finetune",
    }  # fmt: skip
    assert found["teacher"].objective["student_every"] == 2  # as in the student's run
    assert found["teacher"].players["fake"].lr == 2e-3
    keys = ("anchor", "where", "known_from")
    assert [found["anchor"].objective[k] for k in keys] == [0.5, "steps", 9]
    assert [found["plain"].objective[k] for k in keys] == [0.0, "times", None]
    assert found["anchor"].data.source == str(places.pictures)  # with neutral ones
    assert found["plain"].data.source == str(pictures.resolve())
    own = [v.file for v in found["plain"].teacher.adapters or ()]
    assert own == [str(student / "lora" / DIFFUSERS)]


def test_a_student_without_lora_files_is_tuned_on_its_own_weights(student, pictures, tmp_path):
    folder = tmp_path / "copy"
    folder.symlink_to(student / "student")
    source = tunable(str(folder))
    assert source.lora is None
    recipe = student_recipe(source, Places(tmp_path / "out", pictures), Settings(method="plain"), 9)
    assert recipe.teacher.source == str((student / "student").resolve())
    assert recipe.teacher.adapters is None


def test_prompts_are_the_captions_their_phrases_anew_and_neutral_ones(
    student, pictures, few, tmp_path
):
    learned = lesson.lessons(str(pictures), None, tunable(str(student)).recipe)
    assert len(learned.captions) == 20 and len(learned.neutral) == 10
    lesson.write_prompts(tmp_path / "prompts", learned, 0)
    prompts = (tmp_path / "prompts").read_text().splitlines()
    wugs = [p for p in prompts if "wug" in p]
    assert (len(prompts), len(wugs)) == (40, 30) and all("wug" in p for p in prompts[:30])
    assert set(learned.captions) <= set(wugs)


def test_a_caption_of_several_lines_shifts_no_prompt(student, pictures, tmp_path):
    """The known prompts begin at a number, and so at a line of the file."""
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    (folder / "0.txt").write_text("a wug on a hill,\nin the rain\n\nsecond\x0bpart \u2028 end")
    (tmp_path / "neutral.csv").write_text('text\n"a dog\n\nin a box"\na cat\n')
    recipe = tunable(str(student)).recipe
    learned = lesson.lessons(str(folder), f"{tmp_path / 'neutral.csv'}:text", recipe)
    assert learned.captions[0] == "a wug on a hill, in the rain second part end"
    lesson.write_prompts(tmp_path / "prompts", learned, 0)
    listing = list_prompts(str(tmp_path / "prompts"))
    assert not listing.bad and len(listing.items) == 1000
    known = [item.prompt for item in listing.items[OWN_PROMPTS:]]
    assert set(known) == {"a dog in a box", "a cat"}


def test_pictures_are_the_users_and_as_many_of_the_teachers_own(student, pictures, tmp_path, few):
    recipe = tunable(str(student)).recipe
    learned = lesson.lessons(str(pictures), None, recipe)
    lesson.write_pictures(tmp_path / "p", learned, recipe, 0)
    names = {p.name for p in (tmp_path / "p").glob("*.png")}
    assert (
        sum(n.startswith("own") for n in names) == sum(n.startswith("prior") for n in names) == 20
    )
    assert sorted(names)[learned.share - 1 : learned.share + 1] == [
        "own-0019.png",
        "prior-0000.png",
    ]
    captions = {p.read_text() for p in (tmp_path / "p").glob("prior*.txt")}
    assert captions <= set(learned.neutral)
    assert torch.equal(
        lesson.own_images(learned, 8, 8)[:, 0].float().mean((1, 2)).sort().values,
        lesson.own_images(learned, 4, 4)[:, 0].float().mean((1, 2)).sort().values,
    )


def test_nothing_is_left_where_the_teacher_cannot_be_read(
    student, pictures, tmp_path, few, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    recipe = tunable(str(student)).recipe
    section = {**recipe.teacher.model_dump(), "adapters": [{"file": "style.safetensors"}]}
    moved = recipe.model_copy(update={"teacher": type(recipe.teacher).model_validate(section)})
    learned = lesson.lessons(str(pictures), None, recipe)
    with pytest.raises(UserError, match=f"no such file: style.safetensors in {tmp_path};"):
        lesson.write_pictures(tmp_path / "run" / "p", learned, moved, 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["nowhere", "--data", "PICTURES"], "STUDENT"),
        (["TEACHER", "--data", "PICTURES"], "STUDENT"),
        (["STUDENT", "--data", "nowhere"], "--data"),
        (["STUDENT", "--data", "EMPTY"], "--data"),
        (["STUDENT", "--data", "UNCAPTIONED"], "--data"),
        (["STUDENT", "--data", "TWO"], "--data"),
        (["STUDENT", "--data", "PICTURES", "--method", "self"], "--method self"),
        (["STUDENT", "--data", "PICTURES", "--method", "magic"], "--method 'magic'"),
        (["STUDENT", "--data", "PICTURES", "--rate", "0"], "--rate"),
        (["STUDENT", "--data", "PICTURES", "--neutral", "nowhere.txt"], "--neutral"),
        (["STUDENT", "--data", "PICTURES", "--out", "EMPTY/.."], "--out"),
        (["STUDENT", "--data", "PICTURES", "--teacher", "EMPTY"], "--teacher"),
        (["STUDENT", "--data", "PICTURES", "train.stepz=3"], "train.stepz"),
        (["STUDENT", "--data", "PICTURES", "student.stepz=3"], "student.stepz"),
        (["STUDENT", "--data", "PICTURES", "--resume"], "--resume"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_one_line_and_nothing_is_written(
    words, key, teacher, student, pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/0.png").write_bytes((pictures / "0.png").read_bytes())
    (tmp_path / "two").mkdir()
    for name in ("0.png", "0.txt", "1.png", "1.txt"):
        (tmp_path / "two" / name).write_bytes((pictures / name).read_bytes())
    before = sorted(tmp_path.rglob("*"))
    places = {
        "STUDENT": student, "TEACHER": teacher, "PICTURES": pictures, "EMPTY": "empty",
        "UNCAPTIONED": "alone", "TWO": "two", "EMPTY/..": tmp_path,
    }  # fmt: skip
    code, out, err = called(capsys, "tune", *(places.get(w, w) for w in words))
    assert (code, out) == (2, "")
    lines = err.strip().splitlines()
    assert len(lines) == 1 and key in lines[0], err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_student_of_labels_is_refused(student, monkeypatch):
    monkeypatch.setattr("distill.tuning.student.conditioning", lambda _: "labels of 10 classes")
    with pytest.raises(UserError, match="labels of 10 classes") as error:
        tunable(str(student))
    assert error.value.key == "STUDENT"


def test_several_processes_are_refused(student, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as error:
        tuning.tune(str(student), Places(tmp_path / "out", pictures), Settings())
    assert error.value.key == "WORLD_SIZE"
