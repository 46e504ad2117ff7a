"""`distill eval`: what is measured, what is kept of it, and what is refused."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from distill import __main__ as cli
from distill.evaluation import subject
from distill.evaluation.results_file import ResultsFile
from distill.evaluation.subject import Subject, agreement, evaluate
from distill.sampling.student_sampler import check_protocol
from eval.catalogue import headline
from eval.protocols.measure import protocol
from eval.samples import Samples
from teachers.catalogue.loading import load
from teachers.teacher import EMBEDDED
from tests.helpers.refusals import refused


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def grey(digits, level=100, counts=None, drawn=None):
    """Draws noise about one grey; notes the seeds and counts that it was asked for."""

    def draw(prompts, steps, batch):
        def some(wanted, seed):
            if drawn is not None:
                drawn.append((steps, seed))
            rng = torch.Generator().manual_seed(seed)
            noise = torch.randint(0, 20, (len(wanted), 1, 8, 8), generator=rng)
            return Samples((level + noise).to(torch.uint8), wanted, 1.0)

        return some

    return Subject("student", digits, counts, draw, {"level": level}, digits.denoiser)


def test_a_call_that_was_cut_off_goes_on_at_the_seed_that_was_not_done(digits, tmp_path):
    measure, record = protocol("digits"), tmp_path / "r.json.seeds"
    whole = evaluate(grey(digits), measure, [1, 2], 2)
    first: list[tuple[int, int]] = []
    evaluate(grey(digits, drawn=first), measure, [1], 2, record=record)
    again: list[tuple[int, int]] = []
    found = evaluate(grey(digits, drawn=again), measure, [1, 2], 2, record=record)
    assert (first, again) == ([(1, 0), (1, 1)], [(2, 0), (2, 1)])
    assert {k: v["fd"] for k, v in found.items()} == {k: v["fd"] for k, v in whole.items()}
    assert found["1"]["seeds"] == 2 and found["1"]["protocol"] == "digits"


def test_a_file_of_figures_keeps_what_it_holds(digits, tmp_path):
    measure, path, drawn = protocol("digits"), tmp_path / "f.json", []
    for steps, seeds in (([1], 1), ([2], 1), ([1, 2], 2)):
        file = ResultsFile(path, {"source": "grey"})
        file.open()
        found = grey(digits, drawn=drawn)
        rows = evaluate(found, measure, steps, seeds, record=file.record("seeds"))
        file.close({"protocol": "digits", "student": rows})
    assert drawn == [(1, 0), (2, 0), (1, 1), (2, 1)]  # each seed once
    tree = json.loads(path.read_text())
    assert {k: v["seeds"] for k, v in tree["student"].items()} == {"1": 2, "2": 2}
    assert list(tmp_path.iterdir()) == [path]
    file = ResultsFile(path, {"source": "grey"})
    file.open()
    rows = evaluate(grey(digits, 101, drawn=drawn), measure, [1], 1, record=file.record("seeds"))
    file.close({"protocol": "digits", "student": rows})  # of other weights: nothing is kept
    assert list(json.loads(path.read_text())["student"]) == ["1"] and len(drawn) == 5


@pytest.mark.parametrize(("holds", "line"), [
    ("no json", ("--json", "figures")),
    ('{"student": {}}', ("--json", "figures")),
    ('{"of": {"source": "grey"}, "kept": 3}', ("--json", "figures")),
    ('{"of": {"source": "white"}}', ("--json", "white", "grey")),
])  # fmt: skip
def test_a_file_of_anything_else_is_left_alone(tmp_path, holds, line):
    path = tmp_path / "f.json"
    path.write_text(holds)
    with refused(*line):
        ResultsFile(path, {"source": "grey"})
    assert path.read_text() == holds


def test_a_student_is_measured_by_the_protocol_of_its_run(tmp_path):
    (tmp_path / "student").mkdir()
    sidecar = tmp_path / "student/fewstep.json"
    for recipe, teacher, name in (
        ({"eval": {"protocol": "mjhq-30k"}}, "o/m", "mjhq-30k"),
        ({"eval": {"protocol": None}}, "shapes", "shapes"),
    ):
        sidecar.write_text(json.dumps({"teacher": teacher, "recipe": recipe}))
        assert subject.usual_protocol(str(tmp_path)) == name
    assert subject.usual_protocol("digits") == "digits"
    sidecar.write_text(json.dumps({"teacher": "o/m"}))
    for source in (str(tmp_path), "owner/model"):
        with refused("--protocol"):
            subject.usual_protocol(source)


@pytest.mark.parametrize("spoil", ["{", "[]", '{"about": {}, "figures": {"1/0": {}}}'])
def test_what_was_kept_of_something_else_does_not_count(digits, tmp_path, spoil):
    record, drawn = tmp_path / "r", []
    record.write_text(spoil)
    evaluate(grey(digits, drawn=drawn), protocol("digits"), [1], 1, record=record)
    evaluate(grey(digits, 101, drawn=drawn), protocol("digits"), [1], 1, record=record)
    assert len(drawn) == 2
    assert json.loads(record.read_text())["about"]["level"] == 101


def test_means_and_spreads_are_over_the_seeds(digits):
    measure = protocol("digits")
    runs = [measure.measure_seed(grey(digits).sampler([], 1, None), seed) for seed in (0, 1)]
    row = measure.average(runs)
    assert row["fd"] == pytest.approx((runs[0]["fd"] + runs[1]["fd"]) / 2)
    assert row["spread"]["fd"] == pytest.approx(abs(runs[0]["fd"] - runs[1]["fd"]) / 2)


def test_agreement_is_the_mean_psnr_of_pictures_of_the_same_noise(digits):
    near = agreement(grey(digits, 100), grey(digits, 103), ["1"] * 20, 1, 4)
    assert near == {"teacher_psnr": pytest.approx(20 * math.log10(255 / 3))}
    assert agreement(grey(digits), grey(digits), ["1"], 1, 4) == {"teacher_psnr": 99.0}


def test_a_teacher_by_a_stock_scheduler_is_its_solver_of_that_name():
    """EDM's DPM-Solver++ of diffusers against our own, in the protocol's figures."""
    cpu = torch.device("cpu")
    figures = []
    for solver in ("dpmpp_2m", "EDMDPMSolverMultistepScheduler"):
        found = subject.teacher("digits", cpu, solver)
        figures.append(evaluate(found, protocol("digits"), [3], 1)["3"])
    assert figures[0]["fd"] == pytest.approx(figures[1]["fd"], rel=0.02)
    assert figures[0]["coverage"] == pytest.approx(figures[1]["coverage"], abs=0.02)


def test_figures_of_a_teacher_say_what_its_pictures_cost():
    cpu = torch.device("cpu")
    found = subject.teacher("digits", cpu, "ddim", schedule="gits", cache=2)
    row = evaluate(found, replace(protocol("digits"), prompts=["3", "7"] * 50), [3], 2)["3"]
    assert (row["whole_evaluations"], row["shallow_evaluations"]) == (2, 1)
    assert row["search_evaluations"] == 32 * 64  # it is found once, and told with each seed
    assert row["spread"]["evaluations"] == 0
    assert 2 < row["evaluations"] < 3
    names = subject.table_rows(found, {"3": row, "1": {}})
    assert list(names) == [
        f"teacher, {k} of ddim, GITS, DeepCache 2" for k in ("3 steps", "1 step")
    ]
    assert [v["evaluations"] for v in names.values()] == [row["evaluations"], 1]


def test_counts_that_a_student_was_not_trained_for_are_refused(digits):
    with refused("--steps", "3", "1", "2"):
        grey(digits, counts=(1, 2)).check([1, 3])


def test_protocols_are_refused_where_pictures_or_prompts_do_not_fit(digits):
    with refused("protocol shapes", "10"):
        check_protocol(protocol("shapes"), digits)
    wide = replace(protocol("digits"), side=16)
    with refused("protocol digits", "16×16", "8"):
        check_protocol(wide, digits)
    check_protocol(protocol("digits"), digits)


def test_the_figure_that_counts_is_the_first_distance_there_is():
    assert headline({"recall": 1, "cmmd": 1, "fid": 2}) == "fid"
    assert headline({"recall": 1}) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["digits", "--solver", "hein"], ("--solver", "heun")),
        (["digits", "--solver", "UniPCMultistepScheduler"], ("eval", "digits")),
        (["digits", "--schedule", "gitz"], ("--schedule", "'own'", "'ays'", "gits")),
        (["digits", "--schedule", "ays"], ("eval", "digits")),
        (["digits", "--schedule", "gits", "--steps", "4,65"], ("--steps", "65")),
        (["digits", "--adaptive", "0.9"], ("eval", "1")),
        (["digits", "--adaptive", "2"], ("--adaptive", "1", "2.0")),
        (
            ["digits", "--adaptive", "0.9", "--guidance", "2", "--cache", "2"],
            ("eval", "1"),
        ),
        (["digits", "--inherit", "mid_block.resnets.0"], ("eval", "cache: 2 or more")),
        (["digits", "--cache", "2", "--inherit", "mid_block"], ("eval", "no layer that can go")),
        (["digits", "--steps", "0"], ("--steps", "0")),
        (["digits", "--steps", "1,two"], ("--steps", "1,two")),
        (["digits", "--steps", "1,,2"], ("--steps", "1", "2")),
        (["digits", "--against-steps", "5"], ("--against-steps", "--against")),
        (["digits", "--speed", "--seeds", "2"], ("--seeds", "--protocol")),
        (["nowhere/at/all"], ("nowhere/at/all", "digits", "shapes")),
        (["digits", "--against", "shapes"], ("--against", "3×32×32", "1", "8")),
        (["digits", "--against", "nowhere/at/all"], ("teacher 'nowhere/at/all'", "OWNER/NAME")),
        (["digits", "--json", "nowhere/f.json"], ("--json", "exist")),
    ],
)
def test_mistakes_are_said_before_anything_is_drawn(words, said):
    with refused(*said):
        cli.app(["eval", *words], standalone_mode=False)


def test_a_students_measurement_has_no_teachers_options():
    subject.refuse_options({"schedule": "own", "adaptive": None, "cache": 1}, "no such choice")
    with refused("--null-label", "students"):
        subject.refuse_options(
            {"solver": "heun", "null_label": 3}, "students have none; leave it out"
        )


def test_what_was_kept_of_a_local_teacher_counts_while_its_files_are_the_same(tmp_path):
    from safetensors.torch import load_file, save_file

    folder, cpu = tmp_path / "teacher", torch.device("cpu")
    shutil.copytree(EMBEDDED["digits"], folder)
    small = replace(protocol("digits"), prompts=["1"] * 80)
    record, kept = tmp_path / "r.json.seeds", None
    for scale in (1.0, 1.0, 0.8):
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        if scale != 1:
            save_file({k: scale * v for k, v in load_file(weights).items()}, weights)
        found = subject.teacher(str(folder), cpu, "ddim", null_label=10)
        row = evaluate(found, small, [1], 1, record=record)["1"]
        assert (kept is None) or (row["fd"] == kept) == (scale == 1)
        kept = row["fd"]


def test_a_run_without_its_student_is_no_teacher(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "recipe.yaml").write_text("eval: {protocol: digits}")
    for words in ([], ["--protocol", "digits"], ["--speed", "--steps", "1"]):
        with refused(f"student '{tmp_path}'", "--resume"):
            cli.app(["eval", str(tmp_path), *words], standalone_mode=False)
