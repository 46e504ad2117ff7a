"""Rates of cards: measured ones come from docs/results/gpu, and plans use and name them."""

import json
import sys
from pathlib import Path

import pytest

from distill import console, rates
from distill.planning.plan import GPUS, Plan

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import rates as benchmark  # noqa: E402  # pyright: ignore

ROW = {"objective": "dmd2", "batch": 8, "peak_gb": 12.0}
TREE = {
    "device": "NVIDIA H200",
    "torch": "2.11.0",
    "date": "2026-12-01",
    "matrix_tflops": {"bf16": 700.0, "fp32": 50.0},
    "rows": [
        {**ROW, "name": "sdxl-dmd2-lora", "family": "sdxl", "adapter": "lora-64",
         "precision": "bf16", "share": 0.5, "step_ms": 1000.0, "plan_tflop": 210.0},
        {**ROW, "name": "edm-cifar-dmd2", "family": "edm", "adapter": "full",
         "precision": "bf16", "share": 0.1},
        {**ROW, "name": "edm-cifar-ect", "family": "edm", "adapter": "full",
         "precision": "fp32", "share": 0.6},
        {"name": "flux", "error": "out of memory"},
    ],
}  # fmt: skip


@pytest.fixture
def h200(tmp_path, monkeypatch):
    """Rates as the benchmark's command writes them from a results file of one card."""
    results = tmp_path / "gpu"
    results.mkdir()
    (results / "nvidia-h200.json").write_text(json.dumps(TREE))
    (tmp_path / "rates.json").write_text(benchmark.rates(results))
    known = rates.cards(tmp_path / "rates.json")
    monkeypatch.setattr(rates, "cards", lambda path=None: known)
    return known


def test_the_packages_rates_are_those_of_the_results():
    assert rates.FILE.read_text() == benchmark.rates()


def test_rates_keep_a_share_of_every_row_that_was_measured(h200):
    (card,) = h200
    shares = {row["name"]: row["share"] for row in card.rows}
    # of the plan's own FLOPs where there are any: 210 TFLOP a second of 700
    assert shares == {"sdxl-dmd2-lora": 0.3, "edm-cifar-dmd2": 0.1, "edm-cifar-ect": 0.6}


NEAREST = {
    ("sdxl", "lora", "bf16"): (0.3, 700.0, "measured on NVIDIA H200 (sdxl, LoRA)"),
    ("edm", "full", "fp16"): (0.1, 700.0, "measured on NVIDIA H200 (edm, all weights)"),
    ("edm", "full", "fp32"): (0.6, 50.0, "measured on NVIDIA H200 (edm, all weights)"),
    ("sana", "lora", "bf16"): (
        0.2,
        700.0,
        "measured on NVIDIA H200 (mean of 2 other recipes)",
    ),
}


@pytest.mark.parametrize("what", NEAREST)
def test_a_plans_share_is_that_of_the_nearest_recipe(what, h200):
    value, tflops, source = NEAREST[what]
    share = rates.share_of("h200", *what)
    assert (share.value, share.tflops, share.source) == (pytest.approx(value), tflops, source)


def planned(family="sdxl", adapter="lora"):
    return Plan(10**9, 0, 0, 0, 10**9, 0, 10**9, 8, "bf16", {"teacher": 8.0}, 420e12,
                family=family, adapter=adapter)  # fmt: skip


def test_a_plan_divides_by_the_measured_rate_and_says_so(h200, capsys):
    tree = planned().tree("h200", GPUS["h200"])
    assert tree["hours_per_1k_steps"] == pytest.approx(420 / (0.3 * 700) * 1000 / 3600)
    assert tree["share_of_peak"] == pytest.approx(0.3)
    assert tree["share_source"] == "measured on NVIDIA H200 (sdxl, LoRA)"
    assert "assumed_share_of_peak" not in tree
    console.out.print(console.plan_table(tree, 141, 1))
    assert "measured on NVIDIA H200 (sdxl, LoRA)" in capsys.readouterr().out


def test_a_card_without_measurements_is_planned_by_an_assumed_share(h200, capsys):
    tree = planned().tree("h100", GPUS["h100"])
    assert tree["hours_per_1k_steps"] == pytest.approx(420 / (0.4 * 989) * 1000 / 3600)
    assert tree["share_of_peak"] == tree["assumed_share_of_peak"] == 0.4
    assert tree["share_source"] == "assumed"
    console.out.print(console.plan_table(tree, 80, 1))
    assert "assumed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("x86_64", None),
    ],
)
def test_devices_are_known_by_their_names(name, key):
    assert rates.key_of(name) == key


def test_a_devices_rate_is_the_measured_one_or_else_the_published(h200):
    assert rates.rate_of("NVIDIA H200", "fp16") == 700
    assert rates.rate_of("NVIDIA H100 80GB HBM3", "bf16") == 989
    assert rates.rate_of("AMD EPYC", "bf16") is None
