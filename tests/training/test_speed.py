"""The speed that a run prints and logs: what it counts, what it leaves out, when it waits."""

import io
import json
from types import SimpleNamespace

import pytest
import torch

from distill import console, rates, speed
from distill.config.recipe import Recipe
from distill.planning import forecast, kept
from distill.report import curves
from distill.speed import WARM_UP, WINDOW, Speed, Speedometer, Work
from distill.training import build
from tests.helpers.engines import stream
from tests.helpers.toys import recipe_tree

CUDA = torch.device("cuda")


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


@pytest.fixture
def card(monkeypatch):
    """An H200 that holds 12.1 GB, and the list of times that the host waited for it."""
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12.1e9)
    memory = SimpleNamespace(total_memory=141e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(speed, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(rates, "measured", lambda key, known=None: None)
    return waits


def play(meter, clock, first, last, seconds):
    """Steps of equal length."""
    for step in range(first, last + 1):
        clock.now += seconds
        meter.advance(step)


def test_the_warm_up_does_not_count(clock):
    meter = Speedometer(torch.device("cpu"), 64)
    play(meter, clock, 1, WARM_UP - 1, 60.0)
    assert meter.measure(WARM_UP - 1) is None
    play(meter, clock, WARM_UP, WARM_UP, 60.0)
    assert meter.measure(WARM_UP) is None
    play(meter, clock, WARM_UP + 1, WARM_UP + 5, 0.5)
    found = meter.measure(WARM_UP + 5)
    assert (found.steps_per_s, found.images_per_s) == (pytest.approx(2), pytest.approx(128))
    assert found.seconds == pytest.approx(0.5)
    assert found.share is None and found.memory == ""


def test_a_resumed_run_warms_up_again(clock):
    meter = Speedometer(torch.device("cpu"), 64)
    play(meter, clock, 501, 505, 60.0)
    assert meter.measure(505) is None
    play(meter, clock, 506, 510, 60.0)
    play(meter, clock, 511, 520, 0.25)
    assert meter.measure(520).steps_per_s == pytest.approx(4)


def test_grids_and_checkpoints_do_not_count_but_the_time_left_has_them(clock):
    meter = Speedometer(torch.device("cpu"), 8)
    play(meter, clock, 1, 20, 1.0)
    with meter.paused():
        clock.now += 90
    found = meter.measure(20)
    assert found.steps_per_s == pytest.approx(1) and found.seconds == pytest.approx(10)


def test_a_pause_counts_for_all_steps_in_the_time_left_and_not_for_the_last_few(clock):
    """An evaluation of ten minutes after 1,000 steps does not make the remaining ones longer."""
    meter = Speedometer(torch.device("cpu"), 8)
    play(meter, clock, 1, WARM_UP, 1.0)
    play(meter, clock, WARM_UP + 1, WARM_UP + 1000, 1.0)
    meter.measure(WARM_UP + 1000)
    with meter.paused():
        clock.now += 600
    play(meter, clock, WARM_UP + 1001, WARM_UP + 1200, 1.0)
    assert meter.measure(WARM_UP + 1200).seconds == pytest.approx(1.5)


def test_a_figure_is_of_the_last_steps_and_of_no_fewer_than_the_window(clock):
    meter = Speedometer(torch.device("cpu"), 8)
    play(meter, clock, 1, 100, 1.0)
    meter.measure(100)
    play(meter, clock, 101, 100 + WINDOW // 2, 0.1)
    mixed = meter.measure(100 + WINDOW // 2)
    assert 1 < mixed.steps_per_s < 2
    play(meter, clock, 101 + WINDOW // 2, 100 + WINDOW, 0.1)
    assert meter.measure(100 + WINDOW).steps_per_s == pytest.approx(10)


def test_the_host_waits_for_the_card_once_and_before_pauses(clock, card):
    meter = Speedometer(CUDA, 8, "bf16", lambda: 0.0)
    play(meter, clock, 1, 200, 1.0)
    meter.measure(200)
    assert len(card) == 1
    with meter.paused():
        assert len(card) == 2


def test_a_share_is_of_the_cards_rate_and_memory_beside_the_plan(clock, card):
    meter = Speedometer(CUDA, 8, "bf16", lambda: clock.now * 0.38 * 989e12)
    play(meter, clock, 1, 20, 1.0)
    found = meter.measure(20)
    assert found.share == pytest.approx(0.38)
    assert found.text() == "8 images/s  38% of the card  12.1 of 141 GB"
    meter.planned_gb = 12.3
    play(meter, clock, 21, 30, 1.0)
    assert meter.measure(30).text() == "8 images/s  38% of the card  12.1 GB, 12.3 planned"
    assert found.columns() == {
        "speed/steps_per_s": pytest.approx(1),
        "speed/images_per_s": pytest.approx(8),
        "speed/share": pytest.approx(0.38),
        "memory/peak_gb": pytest.approx(12.1),
    }


@pytest.mark.parametrize(
    ("precision", "tf32", "share"), [("fp32", True, None), ("fp32", False, 1), ("bf16", True, 1)]
)
def test_there_is_no_share_where_convolutions_run_in_tf32(
    precision, tf32, share, clock, card, monkeypatch
):
    """It would be several times the whole card: float32's rate is that of other products."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    rate = rates.GPUS["h200"].fp32 if precision == "fp32" else rates.GPUS["h200"].bf16
    meter = Speedometer(CUDA, 8, precision, lambda: clock.now * rate * 1e12)
    play(meter, clock, 1, 20, 1.0)
    assert meter.measure(20).share == (share and pytest.approx(share))


def test_work_is_counted_by_passes_of_samples():
    work = Work(10.0, {"student": 3.0})
    assert work.flops({"student": 4, "fake": 6}, {"student": 2, "fake": 1}) == 10 * (10 + 6 + 1)


WAYS = {
    "all weights": ("dmd2", None, False),
    "adapters": ("dmd2", {"rank": 2}, False),
    "adapters, recomputed": ("dmd2", {"rank": 2}, True),
    "consistency": ("consistency", None, False),
}


QUICK = ("consistency",)


@pytest.mark.parametrize(
    "way", [w if w in QUICK else pytest.param(w, marks=pytest.mark.slow) for w in WAYS]
)
def test_the_work_of_steps_is_roughly_that_of_their_plan(way, pipelines, tmp_path):
    """The counted FLOPs of four steps are the plan's, within 15 %."""
    name, adapters, checkpointing = WAYS[way]
    tree = recipe_tree(name, pipelines["edm"], checkpointing=checkpointing)
    recipe = Recipe.check(tree | ({"adapters": adapters} if adapters else {}))
    engine = build.build(recipe, tmp_path / "run").engine
    data = stream(engine)
    for _ in range(4):
        engine.advance(data)
    data.close()
    assert engine.speed.flops() / 4 == pytest.approx(forecast.plan(recipe).flops, rel=0.15)


def test_lines_of_a_run_have_its_speed_once_it_is_steady(tmp_path, capsys):
    tree = {"teacher": {"source": "analytic:gaussian"}, "objective": {"name": "dmd2"},
            "train": {"steps": 20, "batch": 8, "sample_every": 0, "log_every": 5}}  # fmt: skip
    build.build(Recipe.check(tree), tmp_path / "run").engine.train()
    lines = [json.loads(v) for v in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    columns = {"speed/steps_per_s", "speed/images_per_s", "memory/peak_gb"}
    assert [columns <= line.keys() for line in lines] == [False, False, True, True]
    last = lines[-1]
    assert last["speed/images_per_s"] == pytest.approx(8 * last["speed/steps_per_s"])
    printed = capsys.readouterr().out.splitlines()
    assert ["images/s" in line for line in printed] == [False, False, True, True]
    assert "about" in printed[2] and printed[2].endswith("left")
    assert not columns & curves.series(tmp_path / "run").keys()


VALUES = {"student/loss": 0.28751, "student/grad_norm": 3.0, "fake+critic/loss": 1.875}
STEADY = Speed(0.84, 6.72, 0.38, 1.25, 12.1, "12.1 GB, 12.3 planned")


def shown(monkeypatch, width, terminal):
    """What a terminal shows of a step, or a file gets of it."""
    stream = io.StringIO()
    made = console.PipeSafeConsole(
        file=stream, width=width, height=20, force_terminal=terminal, highlight=False,
        color_system=None,
    )  # fmt: skip
    monkeypatch.setattr(console, "out", made)
    with console.Progress(20_000, 0, True) as progress:
        progress.advance(100)
        progress.show(100, VALUES, STEADY)
        if terminal:
            rendered = made.render_lines(progress.bar.get_renderable(), pad=False)
            return ["".join(s.text for s in line).rstrip() for line in rendered]
    return stream.getvalue().splitlines()


def test_a_file_gets_one_line_for_a_step(monkeypatch):
    assert shown(monkeypatch, 80, False) == [
        "step   100/20000  student 0.2875  fake+critic 1.875  6.72 images/s  38% of the card  "
        "12.1 GB, 12.3 planned  about 7 h left"
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_the_bar_on_one_line_and_the_figures_below(width, monkeypatch):
    bar, *figures = shown(monkeypatch, width, True)
    assert bar.startswith("training ") and bar.endswith("about 7 h left") and "100/20000" in bar
    assert " ".join(" ".join(figures).split()) == (
        "student 0.2875 fake+critic 1.875 6.72 images/s 38% of the card 12.1 GB, 12.3 planned"
    )
    assert len(figures) == (2 if width == 80 else 1)


@pytest.mark.slow
def test_a_run_finds_the_plan_that_was_made_of_its_recipe(pipelines, tmp_path):
    """The plan that distill plan wrote is the one that a run is measured against."""
    tree = recipe_tree("sid", pipelines["edm"])
    tree["data"] |= {"cache": str(tmp_path / "cache")}
    recipe = Recipe.check(tree)
    assert kept.peak_gb(recipe) is None
    plan = forecast.plan(recipe)
    kept.keep(recipe, plan)
    longer = Recipe.check({**tree, "train": {**tree["train"], "steps": 999}})
    larger = Recipe.check({**tree, "train": {**tree["train"], "batch": 16}})
    assert kept.peak_gb(longer) == plan.peak and kept.peak_gb(larger) is None
    kept.place_of(recipe).write_text("cut")
    assert kept.peak_gb(recipe) is None
