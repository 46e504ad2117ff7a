"""What a benchmark finds in its folder: changed, damaged, lost, or of something else."""
# ruff: noqa: F811

import html
import io
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import yaml
from markdown_it import MarkdownIt
from rich.console import Console

from distill.benchmark import leaderboard, runner
from distill.benchmark.leaderboard import LeaderboardRow
from distill.benchmark.plots import plot
from distill.benchmark.spec import Bench, BenchmarkRun, BenchmarkRunner
from tests.helpers.benches import TREE, figures, file, played  # noqa: F401
from tests.helpers.command_line import called
from tests.helpers.refusals import refused_line

OWN = """
from dataclasses import dataclass
from distill.objectives.distribution.sid import SiD

@dataclass(kw_only=True)
class Own(SiD):
    at: float = 0.5
"""


@pytest.fixture
def small(file):
    """A benchmark of one run."""
    file.write_text(yaml.safe_dump({**TREE, "seeds": [0], "rows": TREE["rows"][:1]}))
    return file


@pytest.mark.parametrize("which", ["objective", "teacher", "weaker", "vae"])
def test_a_row_is_another_once_a_file_that_it_is_made_of_has_changed(tmp_path, which):
    places = {k: tmp_path / k for k in ("teacher", "weaker", "vae")}
    for place in places.values():
        place.mkdir()
        (place / "config.json").write_text("{}")
    (tmp_path / "own.py").write_text(OWN)
    guidance = {"scale": 2, "kind": "auto", "weaker": str(places["weaker"])}
    teacher = {"source": str(places["teacher"]), "vae": str(places["vae"]), "guidance": guidance}
    row = {"name": "a", "overrides": {"objective": {"name": f"{tmp_path / 'own.py'}:Own"}}}
    bench = Bench.model_validate({**TREE, "common": {**TREE["common"], "teacher": teacher},
                                  "rows": [row]})  # fmt: skip

    def found():
        return BenchmarkRun(bench, bench.rows[0], 0, tmp_path / "out").hash

    before = found()
    assert found() == before
    changed = tmp_path / "own.py" if which == "objective" else places[which] / "config.json"
    changed.write_text(f"{changed.read_text()}\n")
    assert found() != before


def test_figures_of_an_objective_are_not_kept_once_its_file_has_changed(small, tmp_path, played):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    tree = yaml.safe_load(small.read_text())
    tree["rows"].append({"name": "mine", "overrides": {"objective": {"name": f"{own}:Own"}}})
    small.write_text(yaml.safe_dump(tree))
    runner.bench(str(small), [], tmp_path / "out")
    played.clear()
    own.write_text(f"{OWN}\n")
    runner.bench(str(small), [], tmp_path / "out")
    assert played == ["mine-seed0"]


@pytest.mark.parametrize(("lost", "change", "again"), [
    ("state.json", "seeds=[0]", []),
    ("state.json recipes", "budget.network_evaluations=2000", ["dmd2-seed0"]),
    ("state.json", "common.players.student.lr=0.03", ["dmd2-seed0"]),
])  # fmt: skip
def test_a_run_without_its_state_is_kept_if_it_is_of_this_row_and_else_made_anew(
    small, tmp_path, played, change, again, lost
):
    runner.bench(str(small), [], tmp_path / "out")
    (tmp_path / "out/state.json").unlink()
    if lost != "state.json":  # then nothing says which row it is of
        shutil.rmtree(tmp_path / "out/recipes")
        again = ["dmd2-seed0"]
    played.clear()
    found = runner.bench(str(small), [change], tmp_path / "out")
    assert played == again
    assert figures(found) == figures(runner.bench(str(small), [change], tmp_path / "fresh"))


def test_a_run_that_failed_after_its_summary_has_no_part_in_the_figures(file, tmp_path, played):
    words = ["rows=[{name: DMD2, overrides: {objective: {name: dmd2}}}]"]
    whole = runner.bench(str(file), words, tmp_path / "out")[0]
    path = tmp_path / "out/state.json"
    state = json.loads(path.read_text())
    state["dmd2-seed1"]["failed"] = "no report"
    path.write_text(json.dumps(state))
    line = runner.bench(str(file), words, tmp_path / "out")[0]
    assert (whole.seeds, line.seeds, line.failed) == ([0, 1], [0], {"1": "no report"})
    assert line.metrics["fd"]["spread"] == 0 and line.value("fd") != whole.value("fd")


@pytest.mark.parametrize(("names", "named"), [
    (["recipe.yaml", ".lock", "student/config.json"], "not a benchmark"),
    (["step-5/manifest.json"], "not a benchmark"),
    (["manifest.json", "state.json"], "not a benchmark"),
    (["notes.txt"], "not a benchmark"),
    ([".lock", "recipes"], "recipes"),
    ([".lock", "runs"], "runs"),
    ([".lock", "logs"], "logs"),
    ([".lock", "leaderboard.json/x"], "leaderboard.json"),
    ([".lock", "cost.png/x"], "cost.png"),
])  # fmt: skip
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(
    file, tmp_path, played, capsys, names, named
):
    out = tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("kept")
    before = sorted(out.rglob("*"))
    code, _, err = called(capsys, "bench", file, "--out", out)
    assert code == 2
    refused_line(err, "--out", out, named)
    assert sorted(out.rglob("*")) == before and not played
    assert all((out / name).read_text() == "kept" for name in names)


def test_a_folder_below_a_file_is_refused(file, tmp_path, capsys):
    code, _, err = called(capsys, "bench", file, "--out", file / "out")
    assert code == 2 and err.startswith(f"distill: --out {file / 'out'}: Not a directory; give")


@pytest.mark.parametrize("known", [
    [], "x", None, {"failed": None}, {"row": "a"}, {"row": 1, "failed": None},
    {"row": "a", "failed": 3},
])  # fmt: skip
def test_a_damaged_table_of_runs_is_one_line(file, tmp_path, played, capsys, known):
    out = tmp_path / "out"
    BenchmarkRunner(Bench.load(str(file)), out).close()
    (out / "state.json").write_text(json.dumps({"dmd2-seed0": known}))
    code, _, err = called(capsys, "bench", file, "--out", out)
    assert code == 2 and not played
    assert err == (f"distill: {out / 'state.json'}: damaged; delete it, and run again\n")


@pytest.mark.parametrize("found", [
    1, None, {}, {"fd": 1.0}, {"fd": "x", "spread": {}}, {"fd": float("nan"), "spread": {}},
    {"fd": 1.0, "spread": {"fd": "x"}}, {"fd": 1.0, "spread": 0.5}, {"spread": {}},
    {"fid": 1.0, "fd": None, "spread": {}},
])  # fmt: skip
def test_damaged_figures_of_the_teacher_are_measured_again(file, tmp_path, monkeypatch, found):
    monkeypatch.setattr(runner, "SolverSampler", lambda *_: None)
    contest = BenchmarkRunner(Bench.load(str(file)), tmp_path / "out")

    class Measure:
        name, prompts, calls = "digits", (), 0

        def __call__(self, draw, seeds):
            self.calls += 1
            return {"fd": 2.0, "spread": {"fd": 0.25}}

    measure, recipe = Measure(), contest.bench.reference()
    path = tmp_path / "out/teacher.json"
    lines = runner.teacher_lines(contest, recipe, None, measure)
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: found}))
    assert runner.teacher_lines(contest, recipe, None, measure) == lines
    assert runner.teacher_lines(contest, recipe, None, measure) == lines
    assert measure.calls == 2
    assert lines[0].metrics == {"fd": {"mean": 2.0, "spread": 0.25}}
    contest.close()


def test_the_damaged_summary_of_a_run_is_made_again(small, tmp_path, played, monkeypatch):
    whole = runner.bench(str(small), [], tmp_path / "out")
    path = tmp_path / "out/runs/dmd2-seed0/summary.json"
    prepare = BenchmarkRunner.prepare

    def prepared(self, entry):
        prepare(self, entry)
        assert not path.exists()  # `distill run --resume` would take the run for a finished one

    monkeypatch.setattr(BenchmarkRunner, "prepare", prepared)
    good = json.loads(path.read_text())
    short = {"steps": 1, "wall_s": 1}
    for bad in (
        {**short, "metrics": {"student": {"1": {"fd": 9.0}}}},  # no memory, no evaluations
        {**good, "metrics": {}},
        {**good, "metrics": []},
        {**good, "metrics": {"student": {}}},
        {**good, "metrics": {"student": {"1": {}}}},
        {**good, "metrics": {"student": {"one": {"fd": 9.0}}}},
        {**good, "metrics": {"student": {"1": {"fd": float("nan")}}}},
        {**good, "wall_s": "long"},
        {**good, "steps": None},
    ):
        played.clear()
        path.write_text(json.dumps(bad))
        found = runner.bench(str(small), [], tmp_path / "out")
        assert (played, figures(found)) == (["dmd2-seed0"], figures(whole)), bad


def test_a_run_whose_figures_are_no_numbers_has_failed(small, tmp_path, monkeypatch):
    def play(self, entry):
        (entry.folder / "student").mkdir(parents=True)
        tree = {"steps": 1, "wall_s": 1.0, "network_evaluations": 1, "peak_memory_gb": 1.0,
                "metrics": {"student": {"1": {"fd": float("inf")}}}}  # fmt: skip
        (entry.folder / "summary.json").write_text(json.dumps(tree))

    monkeypatch.setattr(BenchmarkRunner, "play", play)
    (line,) = runner.bench(str(small), [], tmp_path / "out")
    assert line.failed == {"0": "summary.json has no distance, or it is not a finite number"}
    assert (line.steps, line.metrics) == (None, {})


def test_lines_have_the_figures_and_the_steps_that_all_of_their_runs_have(tmp_path):
    bench = Bench.model_validate(TREE)
    cost = {"steps": 1, "wall_s": 1.0, "network_evaluations": 1, "peak_memory_gb": 1.0}
    found = [{"1": {"fd": 1.0, "recall": 0.5}, "2": {"fd": 1.0}}, {"1": {"fd": 3.0}}]
    entries = [
        SimpleNamespace(seed=k, summary=lambda v=v: {**cost, "metrics": {"student": v}})
        for k, v in enumerate(found)
    ]
    contest = SimpleNamespace(bench=bench, failure=lambda _: None, done=lambda _: True)
    (line,) = leaderboard.lines_of(contest, bench.rows[0], entries)
    assert line.metrics == {"fd": {"mean": 2.0, "spread": 1.0}} and line.steps == 1


@pytest.mark.parametrize("name", ["", "a" * 81, "a\nb", "a\x1b[31mb", "a\u2028b"])
def test_a_row_has_a_name_that_a_line_and_a_file_can_hold(file, tmp_path, capsys, name):
    file.write_text(yaml.safe_dump({**TREE, "rows": [{**TREE["rows"][0], "name": name}]}))
    code, _, err = called(capsys, "bench", file, "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "rows.0.name: expected 1 to 80 characters, none of them a control character" in err


NAME = "a|b <b>&amp; *c* [d](e) `f` _g_ # ~~h~~ \\ [/red] $\\frac$"


def test_any_other_name_is_shown_as_it_is(tmp_path):
    bench = Bench.model_validate({**TREE, "rows": [{**TREE["rows"][0], "name": NAME}]})
    metrics = {"fd": {"mean": 1.0, "spread": 0.0}}
    line = LeaderboardRow(NAME, "student", "sid", 1, [0], metrics, 1, 1, 1, 1, {"1": NAME})
    page = leaderboard.markdown(SimpleNamespace(bench=bench), [line])
    shown = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(page)
    assert html.unescape(re.findall(r"<td>(.*?)</td>", shown)[0]) == NAME
    assert html.unescape(re.findall(r"<li>(.*?)</li>", shown)[0]) == f"{NAME}, seed 1: {NAME}"
    terminal = Console(file=io.StringIO(), width=200)
    terminal.print(runner.standings([line]))
    assert NAME in terminal.file.getvalue()
    assert [p.name for p in plot([line], tmp_path)] == ["quality-cost.png", "cost.png"]
