"""Linear students of closed-form Gaussian teachers, against the closed forms."""

import json

import pytest
import torch
from safetensors.torch import load_file

from distill.cli.train import show
from distill.config.recipe import Recipe
from distill.evaluation.finish import finish, finished
from distill.training.build import build
from students import gaussian
from students.export.forms import form_of
from teachers import load
from teachers.analytic import Gaussian
from teachers.process import Karras, Linear, Trig
from tests.helpers.refusals import refused

TREE = {
    "teacher": {"source": "analytic:gaussian"},
    "objective": {"name": "sid", "alpha": 0.5},
    "players": {
        "student": {"lr": 0.02, "weight_decay": 0},
        "fake": {"lr": 0.05, "weight_decay": 0},
    },
    "train": {"steps": 150, "batch": 256, "sample_every": 0, "ema": 0.9},
}


@pytest.mark.parametrize("process", [Karras(), Linear(), Trig()])
def test_a_score_is_the_exact_denoiser_of_its_mean_and_covariance(process):
    mean, root = torch.tensor([0.3, -1.0]), torch.tensor([[1.0, 0.2], [-0.4, 0.7]])
    exact = Gaussian(mean, root @ root.T, process)
    x_t, t = torch.randn(64, 2), torch.rand(64) * 0.9
    torch.testing.assert_close(
        gaussian.Score(mean, root, process)(x_t, t), exact(x_t, t), rtol=1e-3, atol=1e-3
    )


def test_one_step_of_a_linear_student_is_m_plus_r_z():
    student = form_of(load("analytic:gaussian")).student(1, None, True, None)
    with torch.no_grad():
        student.denoiser.root.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    z = torch.randn(8, 2)
    torch.testing.assert_close(student(z), 1 + z @ student.denoiser.root.T)


def test_a_student_of_a_gaussian_comes_near_its_law_and_its_distance_is_exact(tmp_path):
    run = build(Recipe.check(TREE), tmp_path / "run")
    run.engine.train()
    found = finish(run)["metrics"]["student"]["1"]["fd"]
    state = load_file(tmp_path / "run/student/affine.safetensors")
    m, cov = state["mean"].double(), (state["root"] @ state["root"].T).double()
    wanted = torch.tensor([[1.0, 0.5], [0.5, 0.6]], dtype=torch.float64)
    # of two dimensions tr √M = √(tr M + 2 √det M), and M = cov · wanted has the root's eigenvalues
    product = cov @ wanted
    cross = (product.trace() + 2 * product.det().sqrt()).sqrt()
    distance = m.square().sum() + cov.trace() + wanted.trace() - 2 * cross
    assert found == pytest.approx(distance.item(), rel=1e-3)
    assert found < 0.05  # from 2.43
    assert finished(tmp_path / "run")
    show(tmp_path / "run")  # there is no teacher's row, nor a speed


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"objective": {"name": "progressive"}, "data": {"source": "digits"}},
            ("teacher 'analytic:gaussian'", "score"),
        ),
        ({"adapters": {"rank": 2}}, ("teacher 'analytic:gaussian'", "adapters")),
        (
            {"objective": {"name": "dmd2"}, "critic": {}, "data": {"source": "digits"}},
            ("teacher 'analytic:gaussian'", "critic"),
        ),
        ({"student": {"steps": 2}}, ("teacher 'analytic:gaussian'", "student.steps", "1")),
        ({"train": {"steps": 1}}, ("teacher 'analytic:gaussian'", "train.sample_every", "0")),
    ],
)
def test_what_a_linear_student_has_not_is_refused(change, line, tmp_path):
    tree = {**TREE, **change}
    if "data" in change:
        tree["players"] = {}
    with refused(*line):
        build(Recipe.check(tree), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_its_teachers_figures_shows_and_describes_its_students(tmp_path, capsys):
    from distill.publish.card import Facts, quality

    row = {"fd": 1.25, "precision": 0.9, "recall": 0.8, "coverage": 0.7, "images_per_s": 50.0,
           "protocol": "digits", "n": 1797, "seeds": 1, "spread": {"fd": 0.0}}  # fmt: skip
    summary = {"steps": 3, "wall_s": 1.0, "network_evaluations": 10,
               "metrics": {"student": {"1": row, "2": row}}}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    show(tmp_path)
    said = capsys.readouterr().out
    assert (
        "digits: 1,797 samples" in said
        and "±" not in said
        and "teacher, " not in said
        and "1.250" in said
    )
    text = quality(Facts({}, {}, summary))
    assert "Protocol `digits`: 1797 samples, 1 seed for the student; ±" in text
    assert "| student, 2 steps | 2 | 1.250 |" in text and "teacher, " not in text
