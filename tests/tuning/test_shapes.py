"""The new shape of benchmarks/tune_shapes.py, and the page that has its results."""

import importlib.util
import json
from pathlib import Path

import numpy as np

from eval.shapes import all_captions, parse, read, reader, scenes

ROOT = Path(__file__).parent.parent.parent
SPEC = importlib.util.spec_from_file_location("tune_shapes", ROOT / "benchmarks/tune_shapes.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def test_the_reader_of_five_shapes_reads_its_own_drawings_and_tells_them_from_triangles():
    learned, others = bench.new_captions(0)
    assert (len(learned), len(others), len({*learned, *others})) == (50, 40, 90)
    captions = [*learned[:10], *[c for c in bench.OWN if "triangle" in c][::9]]
    with bench.fifth_shape():
        images = scenes.draw(captions, 3)
        assert [s.caption for s in read(images)] == captions
        grid = np.full(1, 16.0)
        area = scenes.coverage(np.full(1, 4), grid, grid, np.full(1, 5.0)).sum()
    assert abs(area / (scenes.AREA[2] * 25) - 1) < 0.01  # as large as a triangle of its extent
    shapes = [s and s.shape for s in read(images[:10])]
    assert "z" not in shapes and len(all_captions()) == 360  # four shapes again
    assert reader.SHAPES is scenes.SHAPES and len(scenes._COVER) == 4
    assert parse(captions[-1]).shape == "triangle"


def test_the_page_has_the_committed_results():
    rows = json.loads((ROOT / "docs/results/tune-shapes.json").read_text())
    assert bench.table(rows) in (ROOT / "docs/tuning.md").read_text()
