"""Benchmarks, on linear students: equal budgets, stops and changes, what is left in the end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml

from distill.benchmark import leaderboard, runner
from distill.benchmark import spec as benches
from distill.benchmark.spec import Bench, BenchmarkRunner, laid_over
from distill.config.optimizer import OptimizerConfig
from distill.config.recipe import Recipe, shipped
from distill.sampling.guided_teacher import load_teacher
from distill.training.engine import Engine
from eval.protocols.measure import protocol
from tests.helpers.benches import BUDGET, TREE, figures
from tests.helpers.command_line import ENV, called
from tests.helpers.refusals import refused


def test_a_benchmark_ends_in_means_and_spreads_over_its_seeds(file, tmp_path, played, capsys):
    runner.bench(str(file), [], tmp_path / "out")
    said = capsys.readouterr().out
    first, *_, last = (line for line in said.splitlines() if line[1:3] == "/4")
    assert first.startswith("1/4  DMD2, seed 0: fd ") and re.search(r"; about \d+ \w+ left$", first)
    assert last.startswith("4/4") and " left" not in last
    lines = json.loads((tmp_path / "out/leaderboard.json").read_text())
    assert {v["name"] for v in lines} == {"DMD2", "SiD α = 1"}
    line = next(v for v in lines if v["objective"] == "sid")
    runs = [tmp_path / f"out/runs/sid-1-seed{k}/summary.json" for k in (0, 1)]
    runs = [json.loads(path.read_text()) for path in runs]
    a, b = (run["metrics"]["student"]["1"]["fd"] for run in runs)
    assert line["metrics"]["fd"]["mean"] == pytest.approx((a + b) / 2)
    assert line["metrics"]["fd"]["spread"] == pytest.approx(abs(a - b) / 2)
    assert line["seeds"] == [0, 1] and line["steps"] == 1 and line["failed"] == {}
    assert line["wall_s"] == pytest.approx(sum(run["wall_s"] for run in runs) / 2)
    each = json.loads((tmp_path / "out/runs.json").read_text())
    assert [v["metrics"]["1"]["fd"] for v in each if v["row"] == "SiD α = 1"] == [a, b]
    assert sorted((v["row"], v["seed"]) for v in each) == [
        (row, k) for row in ("DMD2", "SiD α = 1") for k in (0, 1)
    ]
    assert each[-1]["train_steps"] == runs[1]["steps"] and each[-1]["seed"] == 1
    assert "| SiD α = 1 | 1 |" in (tmp_path / "out/leaderboard.md").read_text()


def test_no_run_exceeds_its_budget_or_leaves_a_step_of_it(file, tmp_path, played):
    lines = runner.bench(str(file), ["seeds=[0]"], tmp_path / "out")
    for line in lines:
        most = 16 * 7  # a step: at most DMD2's with its student's turn
        assert BUDGET - most < line.network_evaluations <= BUDGET
        recipe = Recipe.load(tmp_path / f"out/recipes/{benches.slug(line.name)}-seed0.yaml")
        assert recipe.train.steps == line.train_steps


def test_stopped_and_taken_up_again_a_benchmark_ends_the_same(file, tmp_path, played, monkeypatch):
    whole = runner.bench(str(file), [], tmp_path / "whole")
    advance, count = Engine.advance, iter(range(10**6))

    def stopped(engine, stream):
        logs = advance(engine, stream)
        if next(count) == 60:
            engine._stop = signal.SIGTERM
        return logs

    monkeypatch.setattr(Engine, "advance", stopped)
    with pytest.raises(KeyboardInterrupt):
        runner.bench(str(file), [], tmp_path / "out")
    before = len(played)
    found = runner.bench(str(file), [], tmp_path / "out")
    assert 0 < len(played) - before < 4  # what was finished was not run again
    assert figures(found) == figures(whole)


def test_only_a_changed_row_is_run_again(file, tmp_path, played):
    runner.bench(str(file), ["seeds=[0]"], tmp_path / "out")
    played.clear()
    runner.bench(str(file), ["seeds=[0]"], tmp_path / "out")
    assert played == []
    tree = {**TREE, "rows": [TREE["rows"][0], {**TREE["rows"][1]}]}
    tree["rows"][1]["overrides"] = {"objective": {"name": "sid", "alpha": 0.5}}
    file.write_text(yaml.safe_dump(tree))
    runner.bench(str(file), ["seeds=[0]"], tmp_path / "out")
    assert played == ["sid-1-seed0"]
    recipe = Recipe.load(tmp_path / "out/runs/sid-1-seed0/recipe.yaml")
    assert recipe.objective["alpha"] == 0.5


def test_a_row_that_diverges_is_recorded_and_the_rest_goes_on(file, tmp_path, played):
    broken = {"name": "too fast", "overrides": {
        "objective": {"name": "sid"}, "players": {"student": {"lr": 1e30, "clip": 0}}}}  # fmt: skip
    file.write_text(yaml.safe_dump({**TREE, "rows": [broken, *TREE["rows"]], "seeds": [0]}))
    lines = runner.bench(str(file), [], tmp_path / "out")
    last = lines[-1]
    assert (last.name, last.steps, last.metrics) == ("too fast", None, {})
    assert "loss is" in last.failed["0"] and "\n" not in last.failed["0"]
    assert [bool(v.metrics) for v in lines] == [True, True, False]
    assert "- too fast, seed 0: step" in (tmp_path / "out/leaderboard.md").read_text()
    played.clear()
    runner.bench(str(file), [], tmp_path / "out")
    assert played == []  # it would fail again


def test_a_benchmark_of_which_every_run_fails_writes_its_leaderboard_and_exits_with_1(
    file, tmp_path, played, capsys
):
    broken = {"name": "too fast", "overrides": {
        "objective": {"name": "sid"}, "players": {"student": {"lr": 1e30, "clip": 0}}}}  # fmt: skip
    file.write_text(yaml.safe_dump({**TREE, "rows": [broken]}))
    code, out, err = called(capsys, "bench", file, "--out", tmp_path / "out")
    assert code == 1 and "failed: too fast" in out
    assert err.startswith("distill: every run failed; ") and err.count("\n") == 1
    lines = json.loads((tmp_path / "out/leaderboard.json").read_text())
    assert set(lines[0]["failed"]) == {"0", "1"}
    assert "loss is" in (tmp_path / "out/leaderboard.md").read_text()
    file.write_text(yaml.safe_dump({**TREE, "rows": [broken, TREE["rows"][1]]}))
    code, out, err = called(capsys, "bench", file, "--out", tmp_path / "out")
    assert (code, err) == (0, "") and "failed: too fast" in out


@pytest.mark.parametrize(("overrides", "said"), [
    ({"objective": {"name": "sid"}, "train": {"batch": 32}}, "buy one step, which takes 160; "),
    ({"objective": {"name": "dmd2"}, "adapters": {}}, "adapters: its students are linear"),
    ({"objective": {"name": "sid"}, "data": {"source": "nowhere"}}, "'nowhere' is not a folder; "),
    ({"objective": {"name": "sid"}, "data": {"source": "x.csv:png"}}, "no such file: x.csv"),
    ({"objective": {"name": "sid"}, "data": {"source": "/nowhere:png"}}, "no such folder: "),
    ({"objective": {"name": "sid"}, "data": {"prompts": "x.txt"}}, "no such file: 'x.txt'; give a"),
])  # fmt: skip
def test_a_row_that_can_never_run_is_refused_before_any_work(
    file, tmp_path, played, capsys, overrides, said
):
    rows = [TREE["rows"][0], {"name": "last", "overrides": overrides}]
    file.write_text(yaml.safe_dump({**TREE, "budget": {"network_evaluations": 90}, "rows": rows}))
    code, _, err = called(capsys, "bench", file, "--out", tmp_path / "out")
    assert code == 2 and err.startswith(f"distill: {file}: row 'last': ") and said in err
    assert err.count("\n") == 1 and not played and not (tmp_path / "out").exists()


def test_a_folder_takes_one_benchmark_at_a_time(file, tmp_path):
    first = BenchmarkRunner(Bench.load(str(file)), tmp_path / "out")
    with refused("--out", "work"):
        BenchmarkRunner(Bench.load(str(file)), tmp_path / "out")
    first.close()
    BenchmarkRunner(Bench.load(str(file)), tmp_path / "out").close()


def test_shares_follow_the_steps_that_the_budget_buys():
    bench = Bench.load("bench/digits")
    row = next(r for r in bench.rows if r.name == "progressive, 1 step")
    recipe = bench.recipe(row, seed=2, steps=468)
    assert recipe.objective["stage_steps"] == recipe.players["student"].decay_steps == 71
    assert (recipe.train.steps, recipe.train.seed) == (468, 2)


def test_what_a_row_shares_is_its_own():
    rows = [{**TREE["rows"][0], "shares": {"players.student.warmup": 0.5}}, TREE["rows"][1]]
    bench = Bench.model_validate({**TREE, "rows": rows})
    warmups = [bench.recipe(row, 0, steps=8).players["student"].warmup for row in bench.rows]
    assert warmups == [4, OptimizerConfig().warmup]


def test_a_row_may_have_players_and_rewards_that_begin_later():
    first = TREE["rows"][0]
    late = {**first.get("overrides", {}), "players": {"student": {"begins": 3}}}
    rows = [{**first, "overrides": late}, TREE["rows"][1]]
    rows += [{**first, "name": "share", "shares": {"players.student.begins": 0.5}}]
    bench = Bench.model_validate({**TREE, "rows": rows})
    assert [bench.recipe(row, 0).train.steps for row in bench.rows] == [4, 1, 100]
    assert bench.recipe(bench.rows[2], 0, steps=8).players["student"].begins == 4
    with refused("row 'DMD2'", "players.student.begins", "step 2"):
        bench.recipe(bench.rows[0], 0, steps=2)


@pytest.mark.parametrize("name", [n for n in shipped() if n.startswith("bench/")])
def test_every_shipped_benchmark_is_valid(name):
    assert Bench.load(name).rows


@pytest.mark.parametrize(
    "name", ["bench/digits", pytest.param("bench/shapes", marks=pytest.mark.slow)]
)
def test_every_row_of_a_benchmark_can_count_its_budget(name):
    """Networks that read a landing time or a scale, or whose last layer balances losses, too."""
    bench = Bench.load(name)
    for row in bench.rows:
        bench.budget.check(bench.recipe(row, 0))


def test_the_digits_benchmark_races_all_divergences_at_one_two_and_four_steps():
    from typing import get_args

    from distill.objectives.distribution.fdistill import Divergence

    bench = Bench.load("bench/digits")
    recipes = [bench.recipe(row, 0) for row in bench.rows]
    names = [r.objective.get("divergence") for r in recipes]
    assert set(get_args(Divergence)) <= set(names)
    assert len(bench.rows) >= 14
    for kind in ("dmd2", "fdistill", "consistency"):  # ECT has two steps; SiD gains nothing by more
        assert 4 in {r.student.steps for r in recipes if r.objective["name"] == kind}
    stages = [r.student.steps for r in recipes if r.objective["name"] == "progressive"]
    assert stages == [1, 2, 4]
    assert all(r.eval.teacher_seeds == 0 for r in recipes)  # measured once, by the benchmark


def test_sections_are_merged_and_values_replaced():
    below = {"a": {"x": 1, "y": [1, 2]}, "b": {"z": 3}, "c": 4}
    above = {"a": {"y": [5]}, "b": None, "d": {"w": 6}}
    assert laid_over(below, above) == {
        "a": {"x": 1, "y": [5]}, "b": None, "c": 4, "d": {"w": 6}
    }  # fmt: skip
    assert below["a"]["y"] == [1, 2]


def test_students_are_ordered_by_their_distance_in_the_fewest_steps():
    def line(name, steps, fd, kind="student"):
        metrics = {} if fd is None else {"fd": {"mean": fd, "spread": 0.0}}
        return leaderboard.LeaderboardRow(name, kind, "dmd2", steps, [0], metrics)

    lines = [line("failed", None, None), line("b", 4, 0.1), line("b", 1, 2.0), line("a", 1, 1.0),
             line("heun", 2, 9.0, "baseline"), line("full", 18, 0.5, "teacher")]  # fmt: skip
    found = [(v.name, v.steps) for v in leaderboard.ordered(lines)]
    assert found == [
        ("full", 18), ("heun", 2), ("a", 1), ("b", 1), ("b", 4), ("failed", None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("rowss=[]", "rowss: unknown key; did you mean 'rows'?"),
        ("rows=[{nmae: a}]", "rows.0.nmae: unknown key; did you mean 'name'?"),
        ("rows=[]", "rows: expected at least 1 item, not []"),
        ("seeds=[]", "seeds: expected at least 1 item, not []"),
        ("seeds=3", "seeds: expected a list, not 3"),
        ("budget={}", "budget: expected network_evaluations or seconds, one of the two"),
        (
            "budget={seconds: 1, network_evaluations: 1}",
            "budget: expected network_evaluations or seconds, one of the two",
        ),
        (
            "baselines=[{solver: heun, schedule: ays, scheduler: DDIMScheduler}]",
            "baselines.0: expected a solver or a scheduler, one of the two",
        ),
        ("seeds=[1,1]", "seeds: 1 is named twice"),
        ("seeds=[0,0]", "seeds: 0 is named twice"),
        ("common.train.steps=7", "common: train.steps: remove it"),
        ("rows=[{name: a, shares: {train.seed: 0.5}}]", "'a': shares: train.seed: remove it"),
        ("rows=[{name: a, overrides: {train: {steps: 9}}}]", "overrides: train.steps: remove it"),
        (
            "rows=[{name: a, overrides: {objective: {name: sid}}},"
            " {name: b, overrides: {objective: {name: sid}, teacher: digits}}]",
            "row 'b': its teacher or eval.protocol differs",
        ),
        ("rows=[{name: a, recipe: digits/sct2}]", "did you mean 'digits/sct'"),
        ("rows=[{name: a, overrides: {objective: {name: sidd}}}]", "row 'a': objective.name"),
        (
            "common={teacher: digits, data: {source: digits}};"
            "rows=[{name: a, overrides: {objective: {name: diffusion}}}]",
            "trains teachers",
        ),
        ("rows=[{name: A b}, {name: a B}]", "'A b' and 'a B' would share the folder 'a-b'"),
        ("rows=[{name: a, shares: {train.x: 2}}]", "less than or equal to 1"),
        ("baselines=[{solver: heunn}]", "baselines.0.solver: expected"),
        ("baselines=[{scheduler: DDIM}]", "scheduler: expected 'DDIMScheduler'"),
        (
            "baselines=[{solver: heun, schedule: search}]",
            "expected 'own', 'ays', 'gits'",
        ),
        ("baselines=[{solver: heun, threshold: 1.5}]", "baselines.0.threshold: expected"),
        ("baselines=[{solver: heun, cache: 0}]", "baselines.0.cache: expected"),
        ("baselines=[{solver: heun, cache: 2, guidance: adaptive}]", "expected cache: 1, because"),
        ("baselines=[{scheduler: DDIMScheduler, guidance: adaptive}]", "pipelines guide all steps"),
        ("baselines=[{solver: heun}]", "baselines: a protocol measures them; set eval.protocol"),
        ("rows=[{name: a, overrides: {objective: {name: sid}, teacher: nowhere}}]", "no such"),
    ],
)
def test_a_mistake_in_a_benchmark_is_one_line(file, tmp_path, capsys, change, line):
    code, _, err = called(capsys, "bench", file, *change.split(";"), "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1), err
    assert line in err
    assert not (tmp_path / "out").exists()


def test_the_teacher_and_its_baselines_say_what_a_picture_costs(tmp_path):
    common = {"teacher": {"source": "digits", "guidance": 2}, "data": {"source": "digits"},
              "eval": {"protocol": "digits", "teacher_steps": 3}}  # fmt: skip
    rows = [{"name": "a", "overrides": {"objective": {"name": "sid"}}}]
    baselines = [{"solver": "ddim", "steps": [2]}, {"solver": "heun", "steps": [2], "cache": 2}]
    tree = {"budget": {"seconds": 1}, "seeds": [0], "common": common, "rows": rows}
    contest = BenchmarkRunner(
        Bench.model_validate({**tree, "baselines": baselines}), tmp_path / "out"
    )
    recipe = contest.bench.reference()
    small = replace(protocol("digits"), prompts=["1", "4"] * 40)
    lines = runner.teacher_lines(contest, recipe, load_teacher(recipe.teacher), small)
    cost = [v.value("evaluations") for v in lines]
    assert cost[:2] == [10, 4]  # guided: three steps of Heun, two of DDIM
    assert 4 < cost[2] < 6 and lines[2].value("shallow_evaluations") == 2
    rows = [v for v in leaderboard.table(lines).splitlines() if v.startswith("| ddim")]
    assert rows[0].startswith("| ddim | 2 | 4 |")
    assert (
        runner.teacher_lines(contest, recipe, None, small) == lines
    )  # kept, and not measured again
    contest.close()


class Child:
    """A process that has ended already."""

    def __init__(self, code, said):
        self.returncode, self.said = code, said

    def communicate(self):
        return None, self.said


@pytest.mark.parametrize(
    ("code", "said", "why"),
    [
        (0, "", None),
        (2, "distill: step 3: loss is nan; lower it\n", "step 3: loss is nan; lower it"),
        (1, "Traceback …\n  line 1\nKeyError: 'x'\n\n", "KeyError: 'x'"),
        (-9, "", "it ended with exit code -9 and printed no error"),
    ],
)
def test_why_a_run_failed_is_its_last_line(file, tmp_path, monkeypatch, code, said, why):
    monkeypatch.setattr(benches.subprocess, "Popen", lambda *_, **__: Child(code, said))
    contest = BenchmarkRunner(Bench.load(str(file)), tmp_path / "out")
    assert contest.play(contest.entries[0]) == why
    assert (tmp_path / "out/logs/dmd2-seed0.txt").read_text() == said
    contest.close()


@pytest.mark.parametrize("code", [130, 143, -signal.SIGTERM])
def test_a_run_that_was_stopped_stops_the_benchmark(file, tmp_path, monkeypatch, code):
    monkeypatch.setattr(benches.subprocess, "Popen", lambda *_, **__: Child(code, ""))
    contest = BenchmarkRunner(Bench.load(str(file)), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        contest.play(contest.entries[0])
    contest.close()


@pytest.mark.parametrize("jobs", [1, 2])
def test_as_many_runs_are_under_way_as_there_are_jobs(file, tmp_path, monkeypatch, jobs):
    now, most = [], []

    def play(self, entry):
        now.append(entry)
        time.sleep(0.1)
        most.append(len(now))
        now.remove(entry)
        return "not run"

    monkeypatch.setattr(BenchmarkRunner, "play", play)
    monkeypatch.setattr(benches.BenchmarkRun, "write_recipe", lambda _: None)
    contest = BenchmarkRunner(Bench.load(str(file)), tmp_path / "out")
    ended = list(contest.run(jobs))
    assert sorted(e.name for e in ended) == sorted(e.name for e in contest.entries)
    assert max(most) == jobs
    assert contest.failure(ended[0]) == "not run"
    contest.close()


def start(file, out):
    words = [sys.executable, "-m", "distill", "bench", file, "--out", out]
    return subprocess.Popen(
        [*map(str, words)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_killing_the_command_and_calling_it_again_gives_the_same_leaderboard(
    file, tmp_path, number
):
    """Killed by two kinds of signal and called again, it ends with the same leaderboard."""
    tree = {**TREE, "seeds": [0], "budget": {"network_evaluations": 60_000}}
    file.write_text(yaml.safe_dump(tree))
    whole = start(file, tmp_path / "whole")
    _, err = whole.communicate()
    assert whole.returncode == 0, err
    first = start(file, tmp_path / "out")
    while not list((tmp_path / "out").glob("runs/*/checkpoints/step-*")):
        time.sleep(0.2)
    if number == signal.SIGTERM:
        first.send_signal(number)  # to it alone: it stops its run
    else:
        os.killpg(first.pid, number)
    _, err = first.communicate()
    assert first.returncode == (143 if number == signal.SIGTERM else -number), err
    assert len(list((tmp_path / "out").glob("runs/*/summary.json"))) < 2
    again = start(file, tmp_path / "out")
    _, err = again.communicate()
    assert again.returncode == 0, err
    assert figures(leaderboard.read(tmp_path / "out")) == figures(
        leaderboard.read(tmp_path / "whole")
    )
    names = {p.name for p in (tmp_path / "out").glob("*.png")}
    assert names == {"quality-cost.png", "cost.png"}
