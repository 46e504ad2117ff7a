"""Folders of images whose captions are in Hugging Face's metadata.jsonl or metadata.csv."""

import json

import pytest

from distill.data.images import list_images
from tests.helpers.datasets import folder_of
from tests.helpers.refusals import refused


def rows_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def captions(folder, named=None):
    listing = list_images(str(folder), named, 0, True)
    return {i.name.rpartition("/")[2]: i.prompt for i in listing.items}, listing


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_captions_come_from_the_table_beside_the_images(tmp_path, column):
    folder = folder_of(tmp_path / "a", 3, captioned=False)
    rows_of(folder / "metadata.jsonl", [
        {"file_name": f"00{i}.png", "width": 9, column: f" cat {i} "} for i in (2, 0, 1)
    ])  # fmt: skip
    found, listing = captions(folder)
    assert found == {f"00{i}.png": f"cat {i}" for i in range(3)} and not listing.bad


def test_another_column_is_named(tmp_path):
    folder = folder_of(tmp_path / "a", 1)
    rows_of(folder / "metadata.jsonl", [{"file_name": "000.png", "text": "one", "long": "two"}])
    assert captions(folder)[0] == {"000.png": "one"}
    assert captions(folder, "metadata:long")[0] == {"000.png": "two"}
    assert captions(folder, "txt")[0] == {"000.png": "word 0"}


def test_tables_of_comma_separated_values_and_of_subfolders_are_read(tmp_path):
    folder = folder_of(tmp_path / "a/train", 2, captioned=False)
    lines = ["file_name,text", '000.png,"one, two"', "001.png,three"]
    (folder / "metadata.csv").write_text("\n".join(lines))
    assert captions(tmp_path / "a")[0] == {"000.png": "one, two", "001.png": "three"}


def test_images_without_a_row_and_rows_without_an_image_are_bad(tmp_path):
    folder = folder_of(tmp_path / "a", 2, captioned=False)
    rows_of(folder / "metadata.jsonl", [
        {"file_name": "000.png", "text": "one"}, {"file_name": "777.png", "text": "gone"},
    ])  # fmt: skip
    found, listing = captions(folder)
    assert found == {"000.png": "one"}
    assert {(b.name.rpartition("/")[2], b.kind) for b in listing.bad} == {
        ("777.png", "missing image"), ("001.png", "empty caption"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "named", "says"),
    [
        (
            '{"file_name": "000.png", "words": "a"}',
            None,
            ("data.source", "'text', ", "prompt", "words", "data.captions: metadata:COLUMN"),
        ),
        ('{"file_name": "000.png", "text": "a"}', "metadata:title", ("data.source", "title")),
        ('{"text": "a"}', None, ("data.source", "file_name")),
        ('{"file_name": ', None, ("*/a/metadata.jsonl", "1")),
        ("[1]", None, ("*/a/metadata.jsonl", "1")),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_followed_are_refused(tmp_path, text, named, says):
    folder = folder_of(tmp_path / "a", 1, captioned=False)
    (folder / "metadata.jsonl").write_text(text + "\n")
    with refused(*says):
        captions(folder, named)


def test_a_table_that_is_not_there_is_missed(tmp_path):
    with refused("data.captions", "metadata:text", "metadata.jsonl"):
        captions(folder_of(tmp_path / "a", 1), "metadata:text")


@pytest.mark.parametrize("second", ["000.png", "./000.png"])
def test_two_rows_of_one_image_are_refused(tmp_path, second):
    folder = folder_of(tmp_path / "a", 2, captioned=False)
    rows_of(folder / "metadata.jsonl", [
        {"file_name": "000.png", "text": "one"}, {"file_name": second, "text": "two"},
    ])  # fmt: skip
    with refused("data.source", folder / "metadata.jsonl", folder / "000.png"):
        captions(folder)


def test_two_tables_of_one_folder_are_refused_and_both_are_named(tmp_path):
    folder = folder_of(tmp_path / "a", 2, captioned=False)
    rows_of(folder / "metadata.jsonl", [{"file_name": "000.png", "text": "one"}])
    (folder / "metadata.csv").write_text("file_name,text\n001.png,two\n")
    with refused("data.source", folder / "metadata.csv", folder / "metadata.jsonl"):
        captions(folder)


def test_two_tables_that_name_one_image_are_refused(tmp_path):
    folder = folder_of(tmp_path / "a/b", 1, captioned=False).parent
    rows_of(folder / "metadata.jsonl", [{"file_name": "b/000.png", "text": "one"}])
    rows_of(folder / "b/metadata.jsonl", [{"file_name": "000.png", "text": "two"}])
    with refused("data.source", "image"):
        captions(folder)


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_a_tables_encoding_is_read_by_its_mark_or_refused(tmp_path, coding):
    folder = folder_of(tmp_path / "a", 1, captioned=False)
    text = "file_name,text\n000.png,Köln\n"
    (folder / "metadata.csv").write_bytes(text.encode(coding))
    if coding in ("utf-16-le", "latin-1"):  # bytes without a mark that are no UTF-8
        with refused("*/a/metadata.csv", "8"):
            captions(folder)
    else:
        assert captions(folder)[0] == {"000.png": "Köln"}


def test_a_table_in_a_hidden_folder_is_not_read(tmp_path):
    folder = folder_of(tmp_path / "a", 1)
    folder_of(folder / ".cache", 1, captioned=False)
    rows_of(folder / ".cache" / "metadata.jsonl", [{"file_name": "000.png", "text": "hidden"}])
    assert captions(folder)[0] == {"000.png": "word 0"}


def test_a_table_that_is_a_link_is_read(tmp_path):
    folder = folder_of(tmp_path / "a", 1, captioned=False)
    rows_of(tmp_path / "elsewhere.jsonl", [{"file_name": "000.png", "text": "one"}])
    (folder / "metadata.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    assert captions(folder)[0] == {"000.png": "one"}
