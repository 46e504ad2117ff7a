"""benchmarks/held_out.py: figures of a benchmark's students in features that no loss reads."""

import pytest

from benchmarks import held_out


def test_folders_without_a_run_leave_earlier_figures_as_they_are(tmp_path):
    earlier = tmp_path / "held-out.json"
    earlier.write_text("[1]")
    with pytest.raises(SystemExit, match=r"no finished run of bench/digits in .*nope"):
        held_out.main("bench/digits", tmp_path, [tmp_path / "nope"])
    assert earlier.read_text() == "[1]" and [*tmp_path.iterdir()] == [earlier]
