"""Labels of images: numbers are themselves, names are numbered in order, and it is said."""

import json

import pytest
import yaml

from distill.data import from_recipe
from distill.data.listing import REPORT, Item, Listing, check_labels
from distill.data.prompts import list_prompts
from tests.helpers.command_line import called
from tests.helpers.datasets import folder_of, pixels, png, recipe, tar_of
from tests.helpers.refusals import refused
from tests.helpers.toys import recipe_tree


def labels_of(listing, classes):
    listing.read_labels(classes)
    return [i.prompt for i in listing.items]


def items(*prompts):
    listing = Listing("data.source: 'x'")
    for i, prompt in enumerate(prompts):
        listing.add(Item(f"x[{i}]", prompt), "label")
    return listing


def folders(root, *names):
    for name in names:
        folder_of(root / name, 1, captioned=False)
    return from_recipe.encoding_job(recipe(source=str(root)), pixels(10)).listing


def test_folders_of_numbers_in_range_are_the_labels(tmp_path, capsys):
    found = folders(tmp_path, "9", "3", "7")
    assert [i.prompt for i in found.items] == [3, 7, 9]
    assert found.labels == {"3": 3, "7": 7, "9": 9}
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "of the teacher's 10 classes, 3 have data: 3, 7, 9" in err


def test_all_classes_by_their_numbers_need_no_word(tmp_path, capsys):
    found = folders(tmp_path, *map(str, range(10)))
    assert [i.prompt for i in found.items] == list(range(10))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["10", "-1", "2.5"])
def test_a_number_that_is_no_label_is_refused_in_one_line(tmp_path, name):
    with refused("data.source", repr(name), "10 classes", "0 to 9"):
        folders(tmp_path, "1", name)


def test_folders_with_names_are_numbered_in_sorted_order_with_those_that_are_empty(
    tmp_path, capsys
):
    (tmp_path / "bat").mkdir(parents=True)
    found = folders(tmp_path, "cat", "Ant")
    assert [i.prompt for i in found.items] == [0, 2]
    assert found.labels == {"Ant": 0, "bat": 1, "cat": 2}
    names, have = capsys.readouterr().err.splitlines()
    assert names.endswith(
        "labels are its names in sorted order: 0 is 'Ant', 1 is 'bat', 2 is 'cat'"
    )
    assert have.endswith("of the teacher's 10 classes, 2 have data: 0, 2")


def test_more_names_than_classes_are_refused(tmp_path):
    with refused("data.source", "11", "'a'", "10"):
        folders(tmp_path, *"abcdefghijk")


def test_many_names_are_told_in_a_short_line(capsys):
    listing = items(*(f"class {i:04d}" for i in range(1000)))
    assert labels_of(listing, 1000) == list(range(1000))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and len(err) < 600
    assert "11 is 'class 0011' and 988 more, in data-report.json" in err


def test_images_beside_class_folders_are_named(tmp_path, capsys):
    folder_of(tmp_path / "a/3", 1, captioned=False)
    (tmp_path / "a/x.png").write_bytes(png(1))
    source = from_recipe.source_of(recipe(source=str(tmp_path / "a")), pixels(10))
    assert source.size == 1
    (left,) = source.report["left_out"]
    assert (left["name"], left["kind"]) == (str(tmp_path / "a/x.png"), "no class")
    assert f"{tmp_path / 'a/x.png'}: it lies beside the class folders" in capsys.readouterr().err


def test_labels_of_shards_and_columns_follow_the_same_rule(tmp_path):
    members = [("0.png", png(0)), ("0.cls", b"cat\n"), ("1.png", png(1)), ("1.cls", b"ant")]
    tar_of(tmp_path / "s.tar", members)
    found = from_recipe.encoding_job(recipe(source=str(tmp_path / "s.tar")), pixels(10)).listing
    assert [i.prompt for i in found.items] == [1, 0]
    assert found.labels == {"ant": 0, "cat": 1}
    rows = [{"image": f"{i}.png", "kind": kind} for i, kind in enumerate([7, 3, 7])]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    place = f"{tmp_path / 't.json'}:image"
    found = from_recipe.encoding_job(
        recipe("sid", source=place, captions="kind"), pixels(10)
    ).listing
    assert [i.prompt for i in found.items] == [7, 3, 7]
    (tmp_path / "p.txt").write_text("9\n0\n")
    assert labels_of(list_prompts(str(tmp_path / "p.txt"), "label"), 10) == [9, 0]


@pytest.mark.parametrize("wrong", [10, -1, "-1", "3.0", "1e0"])
def test_a_column_with_a_number_that_is_no_label_is_refused_by_its_row(wrong):
    with refused("data.source", "10"):
        labels_of(items(3, wrong), 10)


def test_blanks_around_a_folder_s_name_shift_no_label(tmp_path):
    found = folders(tmp_path, "ant", "cat ", "dog")
    assert [i.prompt for i in found.items] == [0, 1, 2]
    assert found.labels == {"ant": 0, "cat": 1, "dog": 2}


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("cat", "cat "), ("data.source", "'cat'", "cat ")),
        (("1 ", "1"), ("data.source", "'1'", "'1 '")),
        (("01", "1", "2"), ("data.source", "'01'", "'1'")),
    ],
)
def test_two_folders_of_one_label_are_refused_and_both_are_named(tmp_path, names, says):
    with refused(*says):
        folders(tmp_path, *names)


def test_a_folder_without_a_name_is_refused():
    with refused("data.source", "' '"):
        Listing("data.source: 'x'", folders=[" ", "ant"]).read_labels(10)


def test_two_spellings_of_one_label_are_refused():
    with refused("data.source", "'01'", "'1'"):
        labels_of(items("1", 2, "01"), 10)
    assert labels_of(items("00", "01", "01"), 10) == [0, 1, 1]


def test_what_only_a_program_takes_for_a_number_is_a_name(tmp_path):
    found = folders(tmp_path, "1_0", "inf", "nan")
    assert [i.prompt for i in found.items] == [0, 1, 2]
    assert found.labels == {"1_0": 0, "inf": 1, "nan": 2}


@pytest.mark.parametrize("wrong", [None, "", 3.0, True, [3]])
def test_a_cell_that_can_be_no_label_is_a_bad_item(wrong):
    (bad,) = items(3, wrong).bad
    assert bad.name == "x[1]" and bad.kind in ("missing label", "no label")


def test_labels_by_class_names_of_a_dataset_are_its_numbers(tmp_path):
    datasets = pytest.importorskip("datasets")
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "ant"])}
    )
    rows = {"image": [str(tmp_path / f"{i}.png") for i in range(2)], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    place = f"{tmp_path / 'saved'}:image"
    found = from_recipe.encoding_job(recipe(source=place, captions="label"), pixels(10)).listing
    assert [i.prompt for i in found.items] == [1, 0]
    assert found.labels == {"zebra": 0, "ant": 1}


@pytest.mark.slow
def test_the_run_keeps_its_labels_and_does_not_go_on_with_others(pipelines, tmp_path, capsys):
    """Labels of folders are the run's, and other folders' are refused on a resume."""
    folder_of(tmp_path / "a/cat", 8, captioned=False)
    tree = recipe_tree("consistency", pipelines["edm"], steps=2)
    tree["data"] = {"source": str(tmp_path / "a"), "cache": str(tmp_path / "c")}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(tree))
    code, _, err = called(capsys, "run", path, "--out", tmp_path / "run")
    assert code == 0 and "labels are its names in sorted order: 0 is 'cat'" in err
    assert json.loads((tmp_path / "run" / REPORT).read_text())["labels"] == {"cat": 0}
    folder_of(tmp_path / "a/ant", 1, captioned=False)
    code, _, err = called(
        capsys, "run", path, "--out", tmp_path / "run", "--resume", "train.steps=4"
    )
    assert code == 2
    assert "--resume: label 0 was 'cat' when the run in" in err.splitlines()[-1]
    assert json.loads((tmp_path / "run" / REPORT).read_text())["labels"] == {"cat": 0}
    check_labels(tmp_path / "run", {"labels": {"cat": 0, "dog": 1}})  # one more is no change


@pytest.mark.parametrize("content", ["[]", '{"labels": [1]}', "[" * 100_000])
def test_a_report_of_another_form_holds_no_labels(tmp_path, content):
    (tmp_path / REPORT).write_text(content)
    check_labels(tmp_path, {"labels": {"ant": 0}})
    (tmp_path / REPORT).write_text('{"labels": {"ant": 1}}')
    with refused("--resume", "1", "'ant'"):
        check_labels(tmp_path, {"labels": {"ant": 0, "bee": 1}})
