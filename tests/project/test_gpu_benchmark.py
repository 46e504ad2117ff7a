"""benchmarks/gpu.py: what it counts, what it records of a failure, and its tables."""

import argparse
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from gpu_parts import checks, tables  # noqa: E402

FIELDS = {
    "name", "family", "objective", "adapter", "precision", "compile", "batch", "resolution",
    "shape", "step_ms", "turns_ms", "bound_ms", "ratio", "peak_gb", "plan_gb", "build_gb", "syncs",
    "tflop", "tflops", "share", "compile_s", "recompiles", "recompiles_late", "graph_breaks",
    "data_share", "errors",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Call the command in this process: its exit code and its JSON."""

    def call(*options):
        path = tmp_path_factory.mktemp("gpu") / "cpu.json"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ACCELERATE_USE_CPU", "true")
            patch.setattr(sys, "argv", ["gpu.py", "--cpu", "--json", str(path), *options])
            return gpu.main(), json.loads(path.read_text())

    return call


@pytest.fixture(scope="module")
def measured(run):
    return run("--only", "edm-cifar-dmd2,sana-dmd2-lora", "--steps", "1")


@pytest.mark.slow
def test_every_row_has_every_field_and_its_bound(measured):
    """Two rows are measured on the CPU."""
    code, tree = measured
    assert code == 0
    assert {"device", "torch", "date", "matrix_tflops", "copy_gbs", "experiments"} <= set(tree)
    assert [row["name"] for row in tree["rows"]] == ["edm-cifar-dmd2", "sana-dmd2-lora"]
    for row in tree["rows"]:
        assert set(row) >= FIELDS
        assert row["recompiles_late"] == row["graph_breaks"] == 0
        assert row["ratio"] == pytest.approx(row["step_ms"] / row["bound_ms"], rel=1e-3)
        rate = tree["matrix_tflops"]["fp32"]
        assert row["share"] == pytest.approx(row["tflop"] / row["step_ms"] * 1e3 / rate, rel=1e-3)
        assert row["state_gb"] == pytest.approx(row["plan_state_gb"], rel=1e-3)
        assert 0 < row["errors"]["bf16_native"] < 0.1


@pytest.mark.slow
def test_the_passes_of_dmd2_are_counted(measured):
    """A cycle of five steps has one turn of the student and five of its rivals, each of two."""
    edm, sana = measured[1]["rows"]
    assert edm["samples"] == {
        "full": pytest.approx((2 + 5 * 2) / 5),  # the student's turn; the fake's
        "forward": pytest.approx((2 + 2 + 5 * 2) / 5),  # teacher, fake; the student, for the fake
        "critic input": pytest.approx(2 / 5),
        "critic full": pytest.approx(5 * 4 / 5),  # samples and data
    }
    assert sana["samples"]["full"] == pytest.approx((2 + 5 * 2) / 5)
    assert sana["samples"]["forward"] > (4 + 2) / 5  # guided teacher, fake; and the chain's
    flops = edm["flops"]
    assert flops["full"] == pytest.approx(3 * flops["forward"], rel=0.02)
    assert flops["critic full"] < 0.5 * flops["full"]


@pytest.mark.slow
def test_a_row_that_fails_is_recorded_and_the_next_one_runs(run, capsys, monkeypatch):
    """An error of one row is in the file, and the rows after it are measured."""
    real = gpu.engine_of

    def broken(row, *rest):
        if row.name == "edm-cifar-ect":
            raise RuntimeError("CUDA out of memory. Tried to allocate\nmuch")
        return real(row, *rest)

    monkeypatch.setattr(gpu, "engine_of", broken)
    code, tree = run("--only", "edm-cifar-ect,edm-cifar-dmd2", "--steps", "1", "--budget", "100000")
    first, second = sorted(tree["rows"], key=lambda row: row["name"], reverse=True)
    assert code == 1
    assert first["error"] == "RuntimeError: CUDA out of memory. Tried to allocate"
    assert "step_ms" in second and "error" not in second
    assert "edm-cifar-ect: RuntimeError: CUDA out of memory" in capsys.readouterr().err


def test_rows_beyond_the_budget_are_named(run):
    code, tree = run("--only", "edm-cifar-ect", "--budget", "0")
    assert (code, tree["not_run"], tree["rows"]) == (0, ["edm-cifar-ect"], [])


def test_an_unknown_row_is_refused(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--only", "sdxxl")
    assert stopped.value.code == 2
    assert "'sdxxl' is none of sdxl-dmd2-lora" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--json", "/dev/null/x/cpu.json"), "--json: /dev/null/x/cpu.json cannot be written"),
        (("--json", "/"), "--json: / "),
        (("--steps", "0"), "--steps: 0"),
        (("--only", ""), "--only: '' is none of"),
        (("--only", "edm-cifar-ect", "--set", "train.bacht=4"), "--set: "),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_measured(
    run, capsys, monkeypatch, options, part
):
    monkeypatch.setattr(gpu, "rates", None)
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert stopped.value.code == 2 and part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "file"),
    [({}, "nvidia-h200.json"), ({"only": "edm-cifar-ect"}, None), ({"set": ["a=1"]}, None)],
)
def test_some_rows_or_changed_recipes_do_not_replace_the_devices_file(changes, file, monkeypatch):
    monkeypatch.setattr(gpu, "device_name", lambda device: "NVIDIA H200")
    defaults = {"json": None, "cpu": False, "only": None, "set": []}
    path = gpu.path_of(argparse.Namespace(**{**defaults, **changes}), None)
    assert (path and path.name) == file


def test_choosing_an_adapter_takes_as_many_calls_for_any_number_of_layers():
    (few, n), (many, m) = checks.adapted(1), checks.adapted(2)
    assert m > n and checks.choice_calls(few) == checks.choice_calls(many)


def test_late_graphs_waits_and_unplanned_memory_are_faults():
    row = {"name": "a", "recompiles_late": 0, "syncs": 0, "state_gb": 1.0, "plan_state_gb": 1.005}
    assert gpu.faults(row) == []
    bad = {**row, "recompiles_late": 2, "syncs": 3, "syncs_at": ["x.py:1 × 3"], "state_gb": 1.1}
    assert [line.split(":")[0] for line in gpu.faults(bad)] == ["a", "a", "a"]


@pytest.mark.slow
def test_the_tables_hold_the_figures(measured, tmp_path):
    """Of measured rows, in the form of the page on performance."""
    assert tables.gpus(tmp_path) == tables.NOTHING
    tree = measured[1]
    row = {**tree["rows"][0], "step_ms": 260.4, "bound_ms": 200.0, "ratio": 1.302, "share": 0.21}
    failed = {"name": "sdxl-dmd2-lora", "error": "OutOfMemoryError: CUDA out of memory."}
    results = {**tree, "rows": [row, failed], "not_run": ["sd15-dmd2"],
               "experiments": {"data": {"128": {"host_ms": 1.5}}}}  # fmt: skip
    (tmp_path / "card.json").write_text(json.dumps(results))
    text = tables.gpus(tmp_path)
    assert "| `edm-cifar-dmd2` | edm, 8 px | full | off | 2 | 260 |" in text
    assert "| 200 | 1.30 |" in text and "| 21 % |" in text
    assert "- `sdxl-dmd2-lora` failed: OutOfMemoryError: CUDA out of memory." in text
    assert "- `sd15-dmd2` was not run" in text and "- data, 128: host_ms 1.5" in text
