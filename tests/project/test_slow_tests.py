"""docs/slow-tests.md has a row for each slow test, and is written by the run of them."""

import pytest

from tests.helpers import slow_tests
from tests.helpers.slow_tests import PAGE, Recorder, Row, read, slow_in, written

ONE = "training/test_run_folder.py::test_a_killed_run_leaves_its_folder_free"


def test_every_slow_test_has_a_row_and_every_row_a_test():
    page = PAGE.read_text(encoding="utf-8")
    assert list(read(page)) == list(slow_tests.slow_tests())
    assert written(page, {}) == page, (
        "run pytest -m slow --write-slow, or bring docstrings and rows together"
    )


def test_every_slow_test_says_what_it_shows():
    assert not [name for name, about in slow_tests.slow_tests().items() if not about]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("@pytest.mark.slow\ndef test_a(): ...", ["test_a"]),
        ("SLOW = pytest.mark.slow\n@SLOW\ndef test_a(): ...\ndef test_b(): ...", ["test_a"]),
        (
            "A = [pytest.param(1, marks=pytest.mark.slow)]\n"
            "def some(): return A\n"
            "@pytest.mark.parametrize('x', some())\ndef test_a(x): ...\n"
            "@pytest.mark.timeout(9)\ndef test_b(): ...",
            ["test_a"],
        ),
        ("def test_a(): return pytest.mark.slow", []),
    ],
)
def test_slow_tests_are_found_by_their_marks(source, names):
    assert [name for name, _ in slow_in(source)] == names


def report(name, outcome="passed", when="call", keywords=("slow",)):
    return pytest.TestReport(f"tests/{name}", ("", 0, ""), dict.fromkeys(keywords, 1), outcome,
                             None, when, duration=6.0)  # fmt: skip


def test_a_run_writes_its_tests_rows_and_keeps_the_others(tmp_path):
    page = tmp_path / "slow-tests.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    before = read(page.read_text(encoding="utf-8"))
    recorder = Recorder(page)
    recorder.pytest_runtest_logreport(report(ONE, when="setup"))
    recorder.pytest_runtest_logreport(report(ONE))
    recorder.pytest_runtest_logreport(report("eval/test_eval.py::test_fast", keywords=()))
    recorder.pytest_sessionfinish()
    after = read(page.read_text(encoding="utf-8"))
    assert after[ONE][:2] == ("0.2", "passed") and "torch" in after[ONE].when
    assert {k: v for k, v in after.items() if k != ONE} == {
        k: v for k, v in before.items() if k != ONE
    }


def test_a_row_names_the_cases_that_did_not_pass(tmp_path):
    recorder = Recorder()
    for case, outcome in {"a-1": "passed", "b": "failed", "c": "passed"}.items():
        recorder.pytest_runtest_logreport(report(f"{ONE}[{case}]", outcome))
    recorder.pytest_runtest_logreport(report(f"{ONE}[d]", "skipped", "setup"))
    outcomes = recorder.outcomes[ONE]
    assert slow_tests.result_of(outcomes) == "2 of 4 cases passed; failed: b; skipped: d"
    assert slow_tests.result_of({"the test": "failed"}) == "failed: the test"


def test_a_test_that_never_ran_says_so():
    page = f"{slow_tests.BEGIN}\n{slow_tests.END}\n"
    assert set(read(written(page, {})).values()) == {Row()}
