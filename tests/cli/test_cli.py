"""The command line, as a user meets it: one process for each test that must be one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
import torch
import yaml

from distill import __main__ as cli
from distill import console
from distill.cli.train import show
from distill.publish.card import card
from distill.training import run_folder
from tests.helpers.command_line import ENV, called, command, launched, wait_for
from tests.helpers.refusals import refused, refused_line
from tests.helpers.toys import recipe_tree


@pytest.fixture
def recipe(pipelines, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(recipe_tree("dmd2", pipelines["edm"])))
    return path


@pytest.fixture(scope="module")
def finished(pipelines, tmp_path_factory):
    """A finished small run, made by the command."""
    folder = tmp_path_factory.mktemp("cli")
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(recipe_tree("dmd2", pipelines["edm"])))
    result = command("run", path, "--out", folder / "run")
    assert result.returncode == 0, result.stderr
    return folder / "run"


def test_a_run_folder_holds_all_that_it_should(finished):
    names = {p.name for p in finished.iterdir()}
    assert names >= {"recipe.yaml", "metrics.jsonl", "checkpoints", "student", "summary.json"}
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["objective"] == "dmd2"
    assert summary["steps"] == 4
    assert summary["wall_s"] > 0
    assert (
        summary["network_evaluations"]
        == sum(summary["network_evaluations_by_network"].values())
        > 0
    )
    assert set(summary["versions"]) == {"python", "torch", "accelerate", "diffusers", "fewstep"}
    steps = [json.loads(v)["step"] for v in (finished / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4]


def test_sampling_gives_the_stock_pipelines_pictures(finished, tmp_path, capsys):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(finished / "student")
    pipe.set_progress_bar_config(disable=True)
    for steps in (1, 2):
        out = tmp_path / f"{steps}.npz"
        code, _, err = called(
            capsys, "sample", finished, "--steps", steps, "--n", 6, "--seed", 5, "--labels", "3,1",
            "--out", out,
        )  # fmt: skip
        assert code == 0, err
        stock = pipe(
            batch_size=6, class_labels=[3, 1] * 3, num_inference_steps=steps,
            generator=torch.Generator().manual_seed(5), output_type="np",
        ).images  # fmt: skip
        ours = np.load(out)
        assert ours["labels"].tolist() == [3, 1] * 3
        theirs = (stock * 255).round().transpose(0, 3, 1, 2)
        gap = np.abs(ours["images"].astype(float) - theirs)
        assert gap.max() <= 1 and (gap > 0).mean() < 0.01


def test_a_finished_run_is_not_written_over(finished, capsys):
    code, _, err = called(capsys, "run", finished / "recipe.yaml", "--out", finished)
    assert code == 2
    refused_line(err, "--out", finished, "--resume")


def test_resuming_a_finished_run_shows_it_again(finished, capsys):
    before = (finished / "summary.json").stat().st_mtime
    code, out, _ = called(capsys, "run", finished / "recipe.yaml", "--out", finished, "--resume")
    assert code == 0
    assert "is finished" in out
    assert (finished / "summary.json").stat().st_mtime == before


BARE = ["objective={name: sid}", "critic=null", "data={}", "student={}"]
SONG = ["objective={name: consistency}", "critic=null"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["run", "{r}", "train.stesp=5"], ("train.stesp", "steps")),
        (["run", "{r}", "train.steps=-5"], ("train.steps", "1")),
        (["run", "{r}", "train.steps=soon"], ("train.steps", "soon")),
        (["run", "nowhere.yaml"], ("recipe 'nowhere.yaml'",)),
        (["run", "{r}", "data.source=null"], ("data.source", "dmd2")),
        (["run", "{r}", "data.source=./nowhere"], ("data.source", "./nowhere")),
        (["run", "{r}", "teacher.source=./nowhere"], ("teacher './nowhere'",)),
        (["run", "{r}", "teacher.source=analytic:ring"], ("teacher 'analytic:ring'", "null_label")),
        (["run", "{r}", *BARE, "teacher={source: 'analytic:ring'}"], ("student", "Mixture")),
        (["run", "{r}", "teacher.null_label=44"], ("teacher '*/edm'", "null_label", "44")),
        (
            ["run", "{r}", "teacher.null_label=null", "teacher.guidance=2"],
            ("teacher.guidance", "2.0"),
        ),
        (["run", "{r}", "critic.blocks=[backbone.middle]"], ("critic.blocks", "backbone.middle")),
        (["run", "{r}", "critic.blocks=[]"], ("critic.blocks",)),
        (
            ["run", "{r}", "critic.blocks=[backbone.time_embedding]"],
            ("critic.blocks", "backbone.time_embedding"),
        ),
        (["run", "{r}", "--out", "{r}/run"], ("--out", "small.yaml")),
        (
            ["run", "{r}", "--out", "x" * 300],
            ("'xxx*…xxx*'",),
        ),
        (["run", "{r}", "train.precision=fp16"], ("train.precision", "fp16", "GPU")),
        (["run", "{r}", "train.steps=1e30"], ("train.steps", "1e+30")),
        (
            ["run", "{r}", f"train.steps={10**30}"],
            ("train.steps", "1000000000", "0" * 30),
        ),
        (
            ["run", "{r}", f"train.seed={2**63}"],
            ("train.seed", 2**63),
        ),
        (
            ["run", "{r}", f"players.student.warmup=1{'0' * 400}"],
            ("players.student.warmup", "1000000000"),
        ),
        (["run", "{r}", f"train.batch={10**12}"], ("train.batch", "1000000000", "1000000000000")),
        (
            ["run", "{r}", f"train.batch={10**9}", "critic=null"],
            ("train.batch", "1000000000", "GiB", "train.accumulate"),
        ),
        (
            ["run", "{r}", *SONG, f"objective.levels={10**30}"],
            ("objective.levels", "1000000000", "0" * 30),
        ),
        (["run", "{r}", "student.start=900"], ("student.start", "900.0", "0.002", "80.0")),
        (["run", "{r}", "--resume"], ("--resume",)),
        (["run", "{r}", "--outt", "x"], ("No such option", "--outt")),
        (["run"], ("", "'recipe'")),
        (["frobnicate"], ("", "'frobnicate'")),
        (["sample", "nowhere", "--out", "x.png"], ("student 'nowhere'",)),
        (["sample", "nowhere", "--out", "x.jpg"], ("--out", ".png", ".npz")),
        (["eval", "nowhere"], ("nowhere", "digits")),
        (["eval", "nowhere", "--protocol", "digit"], ("", "digit")),
        (["list", "objectivs"], ("list 'objectivs'", "objectives")),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_two(recipe, tmp_path, capsys, words, line):
    out = ["--out", tmp_path / "run"] if words[0] == "run" and "--out" not in words else []
    words = [w.replace("{r}", str(recipe)) for w in words]
    code, _, err = called(capsys, *words, *out)
    assert code == 2
    refused_line(err, *line)
    assert not (tmp_path / "run").exists()


def test_steps_a_student_was_not_trained_for_are_refused(finished, tmp_path, capsys):
    code, _, err = called(capsys, "sample", finished, "--steps", 3, "--out", tmp_path / "a.png")
    assert code == 2
    refused_line(err, "--steps", "--steps 3: ", "1 or 2 steps")


@pytest.mark.parametrize("best", [None, 2, 1])
def test_a_student_is_sampled_in_its_best_steps_as_its_card_says(finished, tmp_path, capsys, best):
    """The most, where none was measured."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    if best is not None:
        row = {"protocol": "digits", "n": 9, "seeds": 1, "images_per_s": 1.0}
        rows = {str(k): {**row, "fd": 1.0 + (k != best)} for k in (1, 2)}
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps({**summary, "metrics": {"student": rows}}))
    k = best or 2
    assert f"num_inference_steps={k}" in card(run).text
    for name, words in (("a", []), ("b", ["--steps", k]), ("c", ["--steps", 3 - k])):
        out = tmp_path / f"{name}.npz"
        assert called(capsys, "sample", run, *words, "--n", 2, "--out", out)[0] == 0
    a, b, c = (np.load(tmp_path / f"{k}.npz")["images"] for k in "abc")
    assert (a == b).all() and (a != c).any()


def test_a_truncated_checkpoint_is_named_with_its_remedy(finished, tmp_path, capsys):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    newest = sorted((run / "checkpoints").glob("step-*"))[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:500])
    code, _, err = called(capsys, "run", run / "recipe.yaml", "--out", run, "--resume")
    assert code == 2
    refused_line(err, f"checkpoint {newest.parent}", "state.safetensors", f"delete {newest.parent}")


def test_resuming_with_another_recipe_names_the_key(finished, capsys):
    code, _, err = called(
        capsys,
        "run",
        finished / "recipe.yaml",
        "players.student.lr=0.5",
        "--out",
        finished,
        "--resume",
    )
    assert code == 2
    refused_line(err, "--resume", "players", "0.5", finished)


def test_a_folder_that_is_not_a_run_is_left_alone(recipe, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear reader")
    code, _, err = called(capsys, "run", recipe, "--out", tmp_path / "mine")
    assert (code, [p.name for p in (tmp_path / "mine").iterdir()]) == (2, ["thesis.tex"])
    refused_line(err, "--out", tmp_path / "mine")


@pytest.mark.parametrize("words", [(), ("-h",), ("--help",)])
def test_help_shows_every_command_with_a_whole_sentence(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = called(capsys, *words)
    lines = out.split("Commands:\n")[1].strip().splitlines()
    assert (code, err) == (0, "") and len(lines) == len(cli.COMMANDS)
    assert all("..." not in v and v.endswith((".", "…")) for v in lines)


def test_the_version_is_the_packages(capsys):
    assert called(capsys, "--version") == (0, f"fewstep {version('fewstep')}\n", "")


def rows(text: str, *names: str) -> dict[str, list[str]]:
    """The cells after each of these names, at the start of a line."""
    return {n: v[len(n) :].split() for n in names for v in text.splitlines() if v.startswith(n)}


def test_speed_is_compared_with_the_teachers_and_never_with_the_students_own(
    finished, monkeypatch, capsys
):
    from eval.protocols.measure import Protocol

    few = {"fd": 1.0, "precision": 1.0, "recall": 1.0, "coverage": 1.0, "images_per_s": 50.0}
    monkeypatch.setattr(Protocol, "__call__", lambda *_: few)
    code, out, err = called(capsys, "eval", finished, "--protocol", "digits")
    assert code == 0, err
    assert "1 step" in out and "speed" not in out and "×" not in out
    full = {**few, "images_per_s": 20.0, "steps": 18, "solver": "heun", "protocol": "digits"}
    own = {**few, "protocol": "digits", "n": 9, "seeds": 1}
    alone = {**own, "steps": 1, "solver": "heun"}
    metrics = {"teacher": full, "teacher_few": {"1": alone}, "student": {"1": own}}
    summary = json.loads((finished / "summary.json").read_text())
    folder = finished.parent / "shown"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({**summary, "metrics": metrics}))
    show(folder)
    out = capsys.readouterr().out
    cells = rows(out, "teacher, 18 heun steps", "teacher, 1 heun step", "student, 1 step")
    assert [v[-1] for v in cells.values()] == ["1.0×", "2.5×", "2.5×"]


def test_the_first_line_of_a_run_reads_as_a_sentence(recipe, tmp_path, monkeypatch, capsys):
    from distill.training.engine import Engine, Stopped

    def enough(engine):
        raise Stopped(signal.SIGINT)

    monkeypatch.setattr(Engine, "train", enough)
    for words, line in (
        ([], "(unguided, g = 1) to a student of 1 or 2 steps, in "),
        (
            ["student={steps: 1}", "teacher.guidance=1.5"],
            "guidance, g = 1.5: 1 is none) to a student of 1 step, in ",
        ),
    ):
        out = tmp_path / f"run{len(words)}"
        code, said, _ = called(capsys, "run", recipe, *words, "--out", out)
        assert code == 130
        first = said.splitlines()[0]
        assert first.startswith("dmd2: from teacher ")
        assert line in first


def on_a_terminal(*words) -> str:
    """What the command writes to stderr when that is a terminal."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "distill", *map(str, words)],
        stdout=subprocess.DEVNULL, stderr=theirs, env={**ENV, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 1 << 16):
            seen += part
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 2
    return seen.decode()


@pytest.mark.slow
def test_a_run_says_at_once_that_it_prepares_and_only_on_a_terminal(tmp_path, capsys):
    """The line before imports, on a pseudo-terminal and in a pipe."""
    words = ("run", tmp_path / "nowhere.yaml")
    seen = on_a_terminal(*words)
    assert seen.index("preparing") < seen.index("no such file")
    code, _, err = called(capsys, *words)
    assert code == 2 and err.startswith("distill: recipe")


@pytest.mark.slow
def test_a_plan_says_that_it_is_at_work_and_only_on_a_terminal():
    """A line of work in progress on a terminal, and none in a pipe."""
    words = ("plan", "digits/sid", "teacher.source=analytic:ring")
    seen = on_a_terminal(*words)
    assert seen.index("preparing") < seen.index("simulating a step") < seen.index("no weights")
    assert command(*words).stderr.count("\n") == 1


def test_a_signal_stops_in_good_order(recipe, tmp_path):
    out = tmp_path / "run"
    process = launched(recipe, out, "train.steps=100000", "train.save_every=5")
    wait_for(out, "checkpoints/step-*")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].endswith("; add --resume to continue")


@pytest.mark.parametrize(
    ("seconds", "left"), [(1, "9 s"), (60, "9 min"), (3600, "9 h"), (86_400, "9 days")]
)
def test_lines_of_losses_say_how_long_the_rest_takes(monkeypatch, seconds, left):
    progress = console.Progress(20, 10, shown=False)
    monkeypatch.setattr(progress, "start", console.time.monotonic() - seconds)
    assert progress.left(11) == f"about {left} left"
    assert progress.left(10) == progress.left(20) == ""


def test_a_run_without_a_student_yet_is_named_with_the_command_that_goes_on(tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with refused("student '*/run'", "--out", "--resume"):
        cli.app(
            ["sample", str(tmp_path / "run"), "--out", str(tmp_path / "g.png")],
            standalone_mode=False,
        )


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["run", "x"], " before the run began; nothing was written"),
        (["tune", "x"], "; add --resume to continue"),
        (["bench", "x"], "; run the same command again to continue"),
        (["list"], ""),
    ],
)
def test_a_stopped_command_says_how_it_goes_on(monkeypatch, words, advice, tmp_path):
    monkeypatch.setattr("sys.argv", ["distill", *words])
    monkeypatch.setattr(run_folder, "_locks", {})  # another test's run may not have been released
    assert cli.resume_hint() == advice
    run_folder.hold(tmp_path)
    begun = "; add --resume to continue" if words[0] == "run" else advice
    assert cli.resume_hint() == begun
    run_folder.release(tmp_path)


def test_a_signal_in_a_run_of_auto_names_a_command_that_takes_resume(monkeypatch, capsys):
    from distill.cli import errors
    from distill.training.engine import Stopped

    for word, advice in (("auto", "distill run RECIPE --resume"), ("run", "add --resume")):
        monkeypatch.setattr("sys.argv", ["distill", word, "x"])
        assert errors.signal_exit_code(Stopped(signal.SIGINT)) == 130
        assert advice in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stop", "code", "line"),
    [
        (KeyboardInterrupt, 130, "distill: SIGINT: stopped\n"),
        (cli.Terminated, 143, "distill: SIGTERM: stopped\n"),
    ],
)
def test_a_signal_outside_training_ends_in_a_line(stop, code, line, monkeypatch, capsys, tmp_path):
    def stopped(path):
        raise stop

    monkeypatch.setattr("students.metadata.show.report", stopped)
    assert called(capsys, "show", tmp_path / "a.safetensors") == (code, "", line)


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_stream_that_the_shell_closed_is_no_fault(name, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, name, None)
    code, _, err = called(capsys, "show", tmp_path / "a.safetensors")
    assert code == 2 and err.startswith("" if name == "stderr" else "distill: ")
    assert not getattr(sys, name).isatty()
