"""`distill compress`: the table, the folder, and what is refused before any work."""

import json

import pytest

from students.architecture.score import COMPRESSED
from teachers import load
from teachers.reduced.network import CHANGED, REMOVED
from tests.helpers.command_line import called


@pytest.mark.parametrize("source", ["digits", "shapes"])
def test_the_cheapest_layers_go_and_the_rest_is_a_teacher(source, tmp_path, capsys):
    out = tmp_path / "small"
    code, shown, err = called(capsys, "compress", source, "--keep", "0.8", "--out", str(out))
    assert code == 0, err
    text = " ".join(shown.split())
    for name in ("mid_block.resnets.0", "mid_block.resnets.1"):
        assert f"{name} " in text
    assert text.count("goes") == 2 and "MFLOP" in text and f"student.init: {out}" in text
    about = json.loads((out / COMPRESSED).read_text())
    assert sorted(about["remove"]) == ["mid_block.resnets.0", "mid_block.resnets.1"]
    assert about["cost"] > 0 and about["keep"] == 0.8 and about["teacher"] == source
    assert load(str(out)).denoiser.backbone.config[REMOVED] == about["remove"]


def test_layers_that_are_worth_most_run_twice_and_others_go(tmp_path, capsys):
    out = tmp_path / "evolved"
    options = ("--keep", "0.96", "--by", "work", "--repeat", "1", "--out", str(out))
    code, shown, err = called(capsys, "compress", "shapes", *options)
    assert code == 0, err
    about = json.loads((out / COMPRESSED).read_text())
    assert sorted(about["remove"]) == ["mid_block.resnets.0", "mid_block.resnets.1"]
    assert about["repeat"] == ["up_blocks.1.attentions.1"] and about["by"] == "work"
    assert "runs twice" in " ".join(shown.split())
    made = load(str(out)).denoiser.backbone
    assert made.config[CHANGED] == {"up_blocks.1.attentions.1": {"kind": "repeat"}}


def test_a_setting_of_the_config_makes_a_stock_network(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    out = tmp_path / "small"
    options = ("--config", "mid_block_type=null", "--prompts", str(prompts), "--out", str(out))
    code, shown, err = called(capsys, "compress", "shapes", *options)
    assert code == 0, err
    index = json.loads((out / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert "68%" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), ["--keep", "--remove"]),
        (("--keep", "2"), ["--keep 2", "between 0 and 1"]),
        (("--keep", "0.1"), ["--keep", "0.69 of the weights stay"]),
        (("--keep", "0.8", "--remove", "x"), ["--remove"]),
        (("--remove", "mid_block"), ["--remove", "'mid_block'"]),
        (("--config", "mid=null"), ["config", "'mid'"]),
        (("--keep", "0.8", "--by", "price"), ["--by price", "weights, work, time"]),
        (("--remove", "x", "--evolve"), ["--evolve", "--keep"]),
        (("--remove", "x", "--repeat", "1"), ["--repeat"]),
        (("--keep", "0.8", "--prompts", "nowhere.txt"), ["--prompts nowhere.txt"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(options, words, tmp_path, capsys):
    code, _, err = called(capsys, "compress", "digits", *options, "--out", str(tmp_path / "small"))
    assert code == 2 and len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err
    assert not (tmp_path / "small").exists()


def test_a_folder_that_holds_something_is_kept(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = called(capsys, "compress", "digits", "--keep", "0.8", "--out", str(tmp_path))
    assert code == 2 and "not empty" in err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
