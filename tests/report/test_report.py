"""Curves and their bands, and the page of a run as a browser shows it."""

import json
import math
import re
import shutil
import subprocess

import pytest
import torch
import yaml

from distill import __main__ as cli
from distill.config.recipe import Recipe, shipped
from distill.grids import save_grid
from distill.report import curves
from distill.report.charts import chart
from distill.report.curves import Band, Reference
from distill.report.page import pictures, report, verdict
from tests.helpers.cards import ROW
from tests.helpers.pushes import make_run
from tests.helpers.refusals import refused

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def logged(run, values, name="student/loss"):
    """Log a series, one value at each tenth step."""
    lines = [{"step": 10 * (i + 1), "seconds": 1.0, name: v} for i, v in enumerate(values)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path):
    """A finished, measured run with curves and pictures."""
    made = make_run(tmp_path / "run")
    recipe = yaml.safe_load((made / "recipe.yaml").read_text())
    recipe["train"] = {"steps": 30, "batch": 8, "seed": 0, **recipe.get("train", {})}
    (made / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    summary = json.loads((made / "summary.json").read_text())
    few = {"1": {**ROW, "fd": 14.8, "steps": 1, "solver": "heun", "seeds": 1}}
    full = {**ROW, "fd": 0.138, "images_per_s": 80.0, "steps": 18, "solver": "heun", "seeds": 1}
    summary["metrics"] = {"teacher": full, "teacher_few": few, "student": {"1": ROW, "2": ROW}}
    (made / "summary.json").write_text(json.dumps(summary))
    logged(made, [3.0, 2.0, 1.0])
    folder = made / "samples" / "final"
    folder.mkdir(parents=True)
    for name in ("teacher-1", "teacher-18", "student-1", "student-2"):
        save_grid(torch.rand(20, 1, 8, 8) * 2 - 1, folder / f"{name}.png", 10)
    (folder / "prompts.json").write_text(json.dumps(["<script>alert(1)</script>"] * 20))
    return made


def reference(low, high):
    band = Band((10, 20, 30), tuple(low), tuple(high))
    return Reference("some/recipe", 3, {"student/loss": band})


# ---- curves


def test_a_series_is_read_by_step_and_a_resumed_runs_last_word_counts(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "seconds": 2, "a/loss": 5, "a/lr": 1}\n{"step": 2, "a/loss": 4}\n'
        '{"step": 2, "a/loss": 3}\n'
    )
    assert curves.series(tmp_path) == {"a/loss": {1: 5.0, 2: 3.0}}


def test_a_band_is_from_the_lowest_to_the_highest_of_its_runs(tmp_path):
    runs = []
    for i, values in enumerate(([1.0, 5.0], [2.0, 4.0], [3.0, 6.0])):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "recipe.yaml").write_text(f"train: {{seed: {i}, batch: 8}}")
        logged(folder, values)
        runs.append(folder)
    made = curves.record(runs, "some/recipe")
    assert made["runs"] == 3
    assert made["bands"] == {"student/loss": {"steps": [10, 20], "low": [1, 4], "high": [3, 6]}}
    (runs[1] / "recipe.yaml").write_text("train: {seed: 1, batch: 16}")
    with refused("*/1", "train.batch"):
        curves.record(runs, "some/recipe")


def test_a_curve_leaves_its_band_where_it_is_half_beyond_it():
    band = Band((10,), (2.0,), (4.0,))
    assert band.at(10) == (0.0, 6.0)
    assert band.at(11) is None
    good = reference((1, 1, 1), (2, 2, 2))
    assert curves.deviations({"student/loss": {10: 2.9, 20: 0.1, 30: 3.0}}, good) == []
    (left,) = curves.deviations({"student/loss": {10: 1.0, 20: 3.5, 30: 8.0}}, good)
    assert (left.first, left.worst, left.value) == (20, 30, 8.0)
    assert str(left) == "student/loss: 4× the reference at step 30, outside since step 20"


def test_a_run_that_diverged_to_infinity_has_left_its_band(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "student/loss": Infinity}\n')
    (left,) = curves.deviations(curves.series(tmp_path), reference((1, 1, 1), (2, 2, 2)))
    assert left.worst == 10
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "student/loss": NaN}\n')
    assert curves.deviations(curves.series(tmp_path), reference((1, 1, 1), (2, 2, 2)))


def test_compare_says_which_curve_left_and_when(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    logged(other, [3.0, 2.0, 40.0])
    cli.app(["compare", str(other), str(run)], standalone_mode=False)
    out = capsys.readouterr().out
    assert "student/loss: 40× the reference at step 30" in out
    cli.app(["compare", str(run), str(run)], standalone_mode=False)
    assert "every curve stays in its band (3 logged steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), ("*/run", "metrics.jsonl")),
        (
            lambda run: (run / "metrics.jsonl").write_text("{"),
            ("*/run/metrics.jsonl", "damaged"),
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text("[1]\n"),
            ("*/run/metrics.jsonl", "damaged"),
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1e400, "x": 1}'),
            ("*/run/metrics.jsonl", "damaged"),
        ),
        (lambda run: logged(run, [10**400]), ("*/run/metrics.jsonl", "damaged")),
        (lambda run: (run / "recipe.yaml").unlink(), ("*/run", "recipe.yaml")),
        (
            lambda run: (run / "recipe.yaml").write_text("teacher: {sour"),
            ("recipe */run/recipe.yaml", "1", "10", "','"),
        ),
        (
            lambda run: (run / "recipe.yaml").write_text("teacher: digits\n"),
            ("*/run/recipe.yaml", "train.seed"),
        ),
        (
            lambda run: (run / "recipe.yaml").write_text("train: 3\n"),
            ("*/run/recipe.yaml", "train.seed"),
        ),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(run, spoil, said):
    spoil(run)
    for named in ([], ["digits/sid"]):
        with refused(*said):
            cli.app(["compare", str(run), *named], standalone_mode=False)


@pytest.mark.parametrize("values", [[], [3.0]])
def test_curves_without_a_step_in_common_are_not_compared(run, tmp_path, values):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = (run / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(text.replace('0, "sec', '1, "sec'))
    logged(run, values)
    for reference in (str(other), "digits/sid"):
        with refused("*/run/metrics.jsonl", "logged"):
            cli.app(["compare", str(run), reference], standalone_mode=False)


def test_a_report_does_not_praise_curves_that_it_could_not_compare(run):
    (run / "recipe.yaml").write_text(yaml.safe_dump(Recipe.load("digits/sid").tree()))
    assert "have no logged step in common" in report(run).read_text()


def test_an_unknown_reference_is_answered_with_what_there_is(run):
    with refused("reference 'digits/dmd3'", "unknown"):
        curves.reference_for(run, "digits/dmd3")


# ---- charts


def coordinates(svg):
    points = svg.partition('class="line" points="')[2].partition('"')[0]
    return [tuple(map(float, p.split(","))) for p in points.split()]


def test_a_charts_line_falls_as_its_series_does():
    svg = chart("loss", {0: 3.0, 10: 2.0, 20: 1.0})
    (x0, y0), (x1, y1), (x2, y2) = coordinates(svg)
    assert x0 < x1 < x2 and y0 < y1 < y2  # down the page
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.11)


def test_a_chart_of_decades_is_logarithmic():
    heights = [y for _, y in coordinates(chart("loss", {i: 10.0**-i for i in range(4)}))]
    steps = [b - a for a, b in zip(heights, heights[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.11)


@pytest.mark.parametrize(
    ("series", "labels"),
    [
        ({0: 0.1, 10: 0.9}, ["0.2", "0.4", "0.6", "0.8"]),
        ({0: 1.0, 10: 1000.0}, ["1", "10", "100", "1,000"]),
        ({0: 0.02, 10: 0.5}, ["0.03", "0.1", "0.3"]),
    ],
)
def test_a_charts_grid_lines_are_at_round_values(series, labels):
    found = re.findall(r'text-anchor="end">([^<]+)<', chart("loss", series))
    assert found[:-1] == labels and found[-1] == "step 10"


def test_a_single_point_is_a_dot_in_the_middle():
    svg = chart("loss", {40: 0.3})
    assert 'class="dot" cx="179.0"' in svg and svg.count("step 40") == 1


def test_what_left_its_band_is_marked():
    band = Band((0, 10), (1.0, 1.0), (2.0, 2.0))
    assert chart("loss", {0: 1.5, 10: 1.2}, band).count("<circle") == 0
    assert chart("loss", {0: 1.5, 10: 9.0}, band).count("<circle") == 1


def test_charts_of_odd_series_are_still_charts():
    assert chart("none", {}) == "" == chart("nan", {1: math.nan})
    assert "<polyline" in chart("constant", {1: 0.0, 2: 0.0})
    assert chart("a single point", {10: 1.0}).count("<circle") == 1
    assert len(coordinates(chart("long", {i: i * 1.0 for i in range(10_001)}))) < 250
    assert "&lt;b&gt;" in chart("<b>", {1: 1.0})


# ---- the page


def test_the_verdict_is_of_the_best_step_count(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["metrics"]["student"]["2"] = {**ROW, "fd": 0.2, "images_per_s": 800.0}
    assert verdict(summary) == (
        "In 2 steps the student's Fréchet distance is 0.200 ± 0.020: 1.45× the teacher's "
        "in 18 steps (0.138), at 10.0× its speed."
    )
    assert verdict({"metrics": {}}).startswith("Not measured")
    del summary["metrics"]["teacher"], summary["metrics"]["teacher_few"]
    (run / "summary.json").write_text(json.dumps(summary))
    assert "0.200 ± 0.020; the teacher was not measured." in verdict(summary)
    assert "<th>speed</th>" not in report(run).read_text()


def test_a_report_needs_nothing_but_itself(run):
    page = report(run).read_text()
    assert page.count("data:image/png;base64,") >= 6
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def paced(batch, ms):
    return {"batch": batch, "latency_ms": ms, "latency_p90_ms": 2 * ms, "images_per_s": 1e3 / ms,
            "peak_memory_gb": 1.5, "calls": 5}  # fmt: skip


def test_speeds_are_on_the_page_of_a_run_that_has_them(run):
    assert 'id="speed"' not in report(run).read_text()
    machine = {"device": "a card", "dtype": "bfloat16"}
    row = {"evaluations": 2, "single": paced(1, 12.5), "saturated": paced(64, 100.0)}
    tree = {"student": {**machine, "steps": {"2": row}}}
    tree["against"] = {**machine, "steps": {"25": {**row, "evaluations": 50}}}
    (run / "speed.json").write_text(json.dumps({"speed": tree}))
    page = report(run).read_text()
    assert "on a card, bfloat16" in page
    cells = "".join(f"<td>{v}</td>" for v in ("student, 2 steps", 2, 1, "12.5", "25.0", 80, "1.50"))
    assert cells in page and "<td>teacher, 25 steps</td><td>50</td>" in page
    (run / "speed.json").write_text('{"speed": {"student": {}}}')
    with refused("*/run/speed.json", "damaged"):
        report(run)


def recorded(**changes):
    """Writes these entries into a run's summary."""

    def spoil(run):
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | changes))

    return spoil


def measured(student, **changes):
    """Writes these figures of the student into a run's summary, and changes the others."""

    def spoil(run):
        summary = json.loads((run / "summary.json").read_text())
        summary["metrics"] |= {"student": student, **changes}
        (run / "summary.json").write_text(json.dumps(summary))

    return spoil


def overwritten(name, text):
    return lambda run: (run / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (measured({}), ("*/run/summary.json", "student")),
        (measured([]), ("*/run/summary.json", "damaged")),
        (measured({"1": None}), ("*/run/summary.json", "damaged")),
        (
            measured({"1": {k: v for k, v in ROW.items() if k != "images_per_s"}}),
            ("*/run/summary.json", "images_per_s"),
        ),
        (measured({"one": ROW}), ("*/run/summary.json", "damaged")),
        (recorded(versions=["2.7"]), ("*/run/summary.json", "damaged")),
        (recorded(versions=3), ("*/run/summary.json", "damaged")),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1e400, "x": 1}'),
            ("*/run/metrics.jsonl", "damaged"),
        ),
        (measured({"1": ROW}, teacher={}), ("*/run/summary.json", "damaged")),
        (
            overwritten("recipe.yaml", "teacher: digits\n"),
            ("*/run/recipe.yaml", "damaged"),
        ),
        (
            overwritten("recipe.yaml", "train: {seed: 0}"),
            ("*/run/recipe.yaml", "damaged"),
        ),
        (
            overwritten("samples/final/prompts.json", '["a'),
            ("*/run/samples/final/prompts.json", "damaged"),
        ),
        (
            overwritten("samples/final/prompts.json", '"a"'),
            ("*/run/samples/final/prompts.json", "damaged"),
        ),
    ],
)
def test_a_damaged_run_has_no_report_but_a_line_that_names_the_file(run, spoil, said):
    spoil(run)
    with refused(*said):
        report(run)
    assert not (run / "report.html").exists()


def test_files_that_are_no_grids_are_passed_over(run):
    before = pictures(run)
    for name in ("teacher-copy", "teacher-18-copy", "student-copy-2", "student-"):
        (run / "samples" / "final" / f"{name}.png").write_bytes(b"another's")
    assert pictures(run) == before
    assert [p.name for p in before][-1] == "teacher, 18 steps"
    shutil.rmtree(run / "samples" / "final")
    (run / "samples" / "step-000004-at-copy.png").write_bytes(b"another's")
    assert [p.name for p in pictures(run)] == ["student, 2 steps"]


def test_an_unfinished_run_has_no_report(run, tmp_path):
    (run / "summary.json").unlink()
    with refused("run '*/run'", "finished"):
        report(run, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_whole_page(run, tmp_path, width):
    """The rendered document: nothing wider than the window, pictures loaded, the slider works."""
    page = report(run, tmp_path / "page.html")
    probe = """<script>
    const cut = document.getElementById("cut");
    cut.value = 20; cut.dispatchEvent(new Event("input"));
    const right = document.getElementById("right");
    right.selectedIndex = 3; right.dispatchEvent(new Event("change"));
    addEventListener("load", () => document.body.dataset.seen = JSON.stringify({
      wide: document.documentElement.scrollWidth - innerWidth,
      loaded: [...document.images].every(i => i.naturalWidth > 0),
      cut: getComputedStyle(document.getElementById("right-image")).clipPath,
      right: document.getElementById("right-name").textContent,
      rows: document.querySelectorAll("#metrics tbody tr").length,
      charts: document.querySelectorAll("svg polyline").length,
      verdict: document.getElementById("verdict").getBoundingClientRect().height,
    }));</script>"""
    page.write_text(page.read_text().replace("</body>", probe + "</body>"))
    seen = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={max(width, 500)},900", "--dump-dom", str(page)],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    found = json.loads(seen.partition('data-seen="')[2].partition('"')[0].replace("&quot;", '"'))
    assert found["wide"] <= 0 and found["loaded"] and found["verdict"] > 0
    assert "20%" in found["cut"] and found["right"] == "student, 2 steps"
    assert found["rows"] == 4 and found["charts"] == 1


def test_a_run_of_a_shipped_recipe_finds_its_reference(tmp_path):
    """Whatever its seed; but not one of other settings."""
    for words, known in (["train.seed=7"], True), (["train.batch=32"], False):
        tree = Recipe.load("digits/sid", words).tree()
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
        found = curves.match(curves.recipe_tree(tmp_path))
        assert (found is not None and found.recipe == "digits/sid") == known


@pytest.mark.parametrize("name", curves.references())
def test_a_shipped_reference_is_of_a_shipped_recipe(name):
    found = curves.read(curves.references()[name])
    assert found.recipe == name and name in shipped() and found.runs >= 3
    assert found.bands and all(b.steps for b in found.bands.values())
