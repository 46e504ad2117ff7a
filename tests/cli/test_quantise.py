"""`distill quantise`: what is refused before any work. Its work is in tests/students."""

import pytest

from tests.helpers.command_line import called


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", "1"), ["--bits 1"]),
        (("--bits", "16"), ["--bits 16"]),
        (("--activation-bits", "2"), ["--activation-bits 2"]),
        (("--keep-share", "1"), ["--keep-share 1"]),
        (("--prompts", "nowhere.txt"), ["--prompts nowhere.txt"]),
        ((), ["nowhere", "no such folder"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(options, words, tmp_path, capsys):
    out = ("--out", str(tmp_path / "few"))
    code, _, err = called(capsys, "quantise", str(tmp_path / "nowhere"), *options, *out)
    assert code == 2 and len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err
    assert not (tmp_path / "few").exists()


def test_a_folder_that_holds_something_is_kept(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = called(capsys, "quantise", "runs/x", "--bits", "4", "--out", str(tmp_path))
    assert code == 2 and "not empty" in err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
