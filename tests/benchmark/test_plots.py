"""Plots: names apart from one another, and points where the figures are."""

from itertools import combinations

import pytest
from matplotlib.text import Text

from distill.benchmark import plots
from distill.benchmark.leaderboard import LeaderboardRow


def line(name, steps, fd, kind="student", objective="dmd2", wall=10.0):
    metrics = {k: {"mean": v, "spread": 0.0} for k, v in
               (("fd", fd), ("recall", 1 / (1 + fd)), ("coverage", 1 / (1 + fd)))}  # fmt: skip
    return LeaderboardRow(name, kind, objective, steps, [0], metrics, 100, 1000.0, wall, 1.0)


CROWD = [line(f"row {i}", k, 0.3 + 0.001 * i + 0.1 * k, objective=f"kind {i % 6}", wall=5.0 + i)
         for i in range(16) for k in (1, 2, 4)]  # fmt: skip
CROWD += [line("heun", k, 20.0 / k, "baseline", None) for k in (1, 2, 4)]
CROWD += [line("teacher, heun", 18, 0.14, "teacher", None)]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.5, 0.52, 0.54], [0.42, 0.52, 0.62]),
        ([0.0, 0.5, 0.5, 1.0], [0.0, 0.45, 0.55, 1.0]),
        ([0.0, 0.0, 0.99, 1.0], [0.0, 0.1, 0.9, 1.0]),  # and stay beside the axis
    ],
)
def test_names_move_as_little_as_keeps_them_apart(places, expected):
    assert plots.spread_out(places, 0.1) == pytest.approx(expected)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Every figure that the crowd makes, by its file's name."""
    figures = {}

    def keep(fig, path):
        figures[path.name] = fig
        fig.canvas.draw()
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "saved", keep)
        plots.plot(CROWD, tmp_path_factory.mktemp("plots"))
    return figures


def test_no_name_covers_another(drawn):
    assert len(drawn) == 4
    for name, fig in drawn.items():
        for ax in fig.axes:
            texts = [t for t in ax.texts if t.get_text()]
            texts += [t for t in ax.get_yticklabels() if name == "cost.png" and t.get_visible()]
            # of the text alone, as an annotation's own extent takes in its arrow; less a tenth,
            # which is room for descenders
            boxes = [Text.get_window_extent(t) for t in texts]
            boxes = [b.padded(-0.1 * b.height) for b in boxes]
            assert not any(a.overlaps(b) for a, b in combinations(boxes, 2)), name


def test_every_row_is_named_once_with_the_teacher_and_its_best_baseline(drawn):
    names = sorted(t.get_text() for t in drawn["quality-cost.png"].axes[0].texts)
    rows = [f"row {i} (1 step)" for i in range(16)]
    reference = ["teacher untrained, heun (1 step)", "teacher, heun (18 steps)"]
    assert names == sorted(rows + reference)


def test_points_lie_at_their_figures(drawn):
    (first, *_) = drawn["quality-steps.png"].axes[0].lines
    path = [(v.steps, v.value("fd")) for v in CROWD[:3]]
    assert list(zip(*first.get_data(), strict=True)) == path


def test_cost_is_what_the_budget_did_not_hold_equal(drawn, tmp_path, monkeypatch):
    assert drawn["quality-cost.png"].axes[0].get_xlabel() == "training, seconds"
    figures = []
    monkeypatch.setattr(plots, "saved", lambda fig, path: figures.append(fig))
    unequal = [
        line("a", 1, 0.5),
        LeaderboardRow(**{**vars(line("b", 1, 0.6)), "network_evaluations": 9e3}),
    ]
    plots.plot(unequal, tmp_path)
    assert figures[0].axes[0].get_xlabel() == "training, network evaluations"


def test_objectives_differ_by_mark_as_well_as_by_colour():
    looks = plots.looks([line("a", 1, 1.0, objective=f"kind {i}") for i in range(7)])
    assert len(set(looks.values())) == 7
    assert len({mark for _, mark in looks.values()}) == 7


def test_without_a_student_there_is_nothing_to_draw(tmp_path):
    assert plots.plot([LeaderboardRow("a", "student", "dmd2", None, [], {})], tmp_path) == []


def test_many_rows_are_ranked_by_their_best_distance(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "saved", lambda fig, path: figures.append(fig) or path)
    rows = [*CROWD, *(line(f"more {i}", 2, 0.2 + 0.1 * i) for i in range(10))]
    assert plots.quality_by_steps(rows, tmp_path) == [tmp_path / "quality-steps.png"]
    (ax,) = figures[0].axes
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert len(names) == 27
    assert names[-1] == "more 0" and names[0] == "heun"
    dots = {v.get_label(): v for v in ax.lines if not v.get_label().startswith("_")}
    assert list(dots) == ["1 step", "2 steps", "4 steps", "teacher, heun, 18 steps"]
    x, y = dots["1 step"].get_data()
    assert len(x) == 17 and x[list(y).index(names.index("row 3"))] == pytest.approx(0.403)
    assert [names[i] for i in dots["2 steps"].get_data()[1]].count("more 4") == 1


def test_very_many_rows_have_a_second_picture_of_the_best(tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(plots, "saved", lambda fig, path: figures.update({path.name: fig}) or path)
    rows = [*CROWD, *(line(f"more {i}", 2, 0.2 + 0.01 * i) for i in range(30))]
    paths = plots.quality_by_steps(rows, tmp_path)
    assert [v.name for v in paths] == ["quality-steps.png", "quality-best.png"]
    (ax,) = figures["quality-best.png"].axes
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == [f"more {i}" for i in reversed(range(20))]
    assert "The best 20 of 47" in ax.get_title()
