"""Tables say one thing for each row, or are refused by file, row and remedy."""

import csv

import pytest

from distill.data.images import list_images, place_of_images
from distill.data.prompts import list_prompts
from eval import text
from tests.helpers.datasets import folder_of, png, tar_of
from tests.helpers.refusals import refused


def prompts(place, column="text"):
    return [i.prompt for i in list_prompts(f"{place}:{column}").items]


CSV = {
    "a comma without quotes": (
        "id,text\n0,fine\n1,a red circle, above a square\n", 3, "3 values for 2 named columns",
    ),
    "a comma in a column without a name": (
        "id,text,\n1,a red circle, above a square\n", 2, "3 values for 2 named columns",
    ),
    "a quote that is not closed": (
        'id,text\n1,fine\n\n2,"a red circle\n3,a blue one\n', 4, "close each double quote",
    ),
    "a quote that a later one closes": (
        'id,text\n1,"a red circle\n2,"a blue one"\n', 2, "close each double quote",
    ),
    "a value without end": (
        f"id,text\n1,{'a' * (csv.field_size_limit() + 1)}\n", 2, "more than 131,072 characters",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CSV)
def test_rows_that_can_be_read_two_ways_are_refused_by_their_line(tmp_path, name):
    content, line, says = CSV[name]
    (tmp_path / "p.csv").write_text(content)
    (tmp_path / "p.tsv").write_text(content.replace(",", "\t"))
    for file in ("p.csv", "p.tsv"):
        want = says if file == "p.csv" else says.replace("a comma", "a tab")
        with refused("data.prompts", file, f"line {line}", want):
            prompts(tmp_path / file)
    folder = folder_of(tmp_path / "a", 2, captioned=False)
    (folder / "metadata.csv").write_text(content.replace("id,", "file_name,", 1))
    with refused("*/a/metadata.csv", f"line {line}", says):
        list_images(str(folder), None, 0, True)


def test_quoted_commas_quotes_and_line_ends_are_read_to_the_letter(tmp_path):
    file = tmp_path / "p.csv"
    file.write_text(',text,,\n0,"one, ""two""\nthree",,\n\n1, four ,,\n2\n')
    assert list(text.csv_rows(file.read_text())) == [
        {"text": 'one, "two"\nthree'}, {"text": " four "}, {"text": None},
    ]  # fmt: skip
    listing = list_prompts(f"{file}:text")
    assert [i.prompt for i in listing.items] == ['one, "two"\nthree', "four"]
    assert [b.name for b in listing.bad] == [f"{file}[2]"]


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("p.csv", "text,id,text\na,1,b\n", "'text'"),
        ("p.tsv", "text\ttext\na\tb\n", "'text'"),
        ("p.jsonl", '{"text": "a"}\n\n{"text": "b", "text": "c"}\n',
         "line 3: the key 'text'"),
        ("p.json", '[{"text": "b", "text": "c"}]', "the key 'text'"),
        ("p.jsonl", '{"text": "a"}\n{"text": ', "line 2 "),
        ("p.jsonl", '{"text": "a"}\n[1]', "line 2 "),
    ],
)  # fmt: skip
def test_columns_and_keys_that_are_there_twice_are_refused(tmp_path, file, content, says):
    (tmp_path / file).write_text(content)
    with refused("data.prompts", file, says):
        prompts(tmp_path / file)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("P.JSONL", '{"text": "a"}\n{"text": "b"}\n'),
        ("P.Json", '[{"text": "a"}, {"text": "b"}]'),
        ("P.CSV", "text\na\nb\n"),
        ("P.TSV", "id\ttext\n0\ta\n1\tb\n"),
    ],
)
def test_a_table_is_known_by_its_suffix_in_either_case(tmp_path, file, content):
    (tmp_path / file).write_text(content)
    assert prompts(tmp_path / file) == ["a", "b"]
    with refused("data.prompts", "column"):
        list_prompts(str(tmp_path / file))
    with refused("data.source", "column"):
        place_of_images(str(tmp_path / file))
    with refused("data.prompts", "such"):
        list_prompts(f"{tmp_path / 'none'}{file[1:]}:text")


def test_captions_tables_and_shards_are_known_in_either_case(tmp_path):
    a = folder_of(tmp_path / "a", 3)
    (a / "000.txt").rename(a / "000.TXT")
    (a / "001.txt").unlink()
    (a / "001.JSON").write_text('{"caption": "of json"}')
    listing = list_images(str(a), None, 0, True)
    assert [i.prompt for i in listing.items] == ["word 0", "of json", "word 2"]
    (a / "Metadata.CSV").write_text("file_name,text\n000.png,x\n001.png,y\n002.png,z\n")
    assert [i.prompt for i in list_images(str(a), None, 0, True).items] == ["x", "y", "z"]
    (tmp_path / "b").mkdir()
    tar_of(tmp_path / "b/S.TAR", [("0.PNG", png(0)), ("0.TXT", b"w")])
    for place in (tmp_path / "b", tmp_path / "b/S.TAR"):
        assert [i.prompt for i in list_images(str(place), None, 0, True).items] == ["w"]


def test_two_captions_of_one_image_are_a_bad_item(tmp_path):
    a = folder_of(tmp_path / "a", 3)
    (a / "000.TXT").write_text("another")
    (a / "001.txt").unlink()
    (a / "001.json").write_text('{"caption": "one", "caption": "two"}')
    listing = list_images(str(a), None, 0, True)
    assert [i.prompt for i in listing.items] == ["word 2"]
    assert [(b.kind, b.reason) for b in listing.bad] == [
        ("unreadable caption", "both 000.TXT and 000.txt lie beside it; keep one"),
        ("unreadable caption", "001.json: the key 'caption' is repeated; keep one"),
    ]


@pytest.mark.parametrize("second", ["0.txt", "0.TXT"])
def test_a_member_that_a_shard_holds_twice_is_refused(tmp_path, second):
    members = [("0.png", png(0)), ("0.txt", b"one"), (second, b"two"), ("1.png", png(1))]
    tar_of(tmp_path / "s.tar", members)
    with refused("data.source", "s.tar", second):
        list_images(str(tmp_path / "s.tar"), None, 0, True)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("a**b.tar", ("data.source", "'**'")),
        ("{0..99999999999}.tar", ("data.source", "1,000,000")),
        ("{0..999999}{0..9}.tar", ("data.source", "1,000,000")),
        ("{0..%s}.tar" % ("9" * 30), ("data.source", "1,000,000")),
    ],
)
def test_patterns_that_can_name_no_shards_are_refused(tmp_path, pattern, says):
    with refused(*says):
        place_of_images(str(tmp_path / pattern))


@pytest.mark.parametrize("place", ["a red circle, " * 50, "~nobody-of-that-name/x"])
@pytest.mark.parametrize("column", ["", ":text"])
def test_a_text_that_can_be_no_path_is_refused_in_a_line(place, column):
    for key, look in (("prompts", list_prompts), ("source", place_of_images)):
        with refused(f"data.{key}", place[:20]) as error:
            look(place + column)
        assert len(str(error.value)) < 300
