"""Captions and prompts are read to the letter, or refused by name."""

import json

import pytest

from distill.data import from_recipe
from distill.data.images import list_images
from distill.data.listing import REPORT
from distill.data.prompts import list_prompts
from eval import prompt_benchmarks, text
from eval.errors import MetricError
from eval.protocols import spec
from tests.helpers.datasets import folder_of, png, recipe, tar_of, toy
from tests.helpers.refusals import refused

WORDS = "Köln, “ЖАР”\u2028猫"
READ = {
    "UTF-8": WORDS.encode(),
    "UTF-8 with a mark": WORDS.encode("utf-8-sig"),
    "UTF-16, little-endian": b"\xff\xfe" + WORDS.encode("utf-16-le"),
    "UTF-16, big-endian": b"\xfe\xff" + WORDS.encode("utf-16-be"),
}
REFUSED = {
    "Latin-1": "Köln".encode("latin-1"),
    "Shift JIS": "日本語".encode("shift_jis"),
    "UTF-32": "Köln".encode("utf-32"),
    "UTF-16 cut short": "Köln".encode("utf-16")[:-1],
}


@pytest.mark.parametrize("name", READ)
def test_a_caption_is_read_to_the_letter(tmp_path, name):
    a = folder_of(tmp_path / "a", 2)
    (a / "000.txt").write_bytes(READ[name])
    (a / "001.txt").unlink()
    mark = READ[name][:3] if "mark" in name else READ[name][:2] if "16" in name else b""
    coding = "utf-16-be" if "big" in name else "utf-16-le" if "16" in name else "utf-8"
    tree = json.dumps({"caption": WORDS}, ensure_ascii=False)
    (a / "001.json").write_bytes(mark + tree.encode(coding))
    assert [i.prompt for i in list_images(str(a), None, 0, True).items] == [WORDS, WORDS]
    members = [(p.name, p.read_bytes()) for p in sorted(a.iterdir())]
    tar_of(tmp_path / "s.tar", members)
    found = list_images(str(tmp_path / "s.tar"), None, 0, True)
    assert [i.prompt for i in found.items] == [WORDS, WORDS]


@pytest.mark.parametrize("name", REFUSED)
def test_a_caption_in_another_encoding_is_bad_and_names_its_file(tmp_path, name):
    a = folder_of(tmp_path / "a", 2)
    (a / "000.txt").write_bytes(REFUSED[name])
    tar_of(tmp_path / "s.tar", [(p.name, p.read_bytes()) for p in sorted(a.iterdir())])
    for place, file in ((a, "000.txt"), (tmp_path / "s.tar", ".txt")):
        listing = list_images(str(place), None, 0, True)
        assert [i.prompt for i in listing.items] == ["word 1"]
        (bad,) = listing.bad
        assert bad.kind == "unreadable caption"
        assert bad.reason.startswith(f"{file} is ") and bad.reason.endswith("save it as UTF-8")
    with refused("data.source", "000.png", "000.txt", "8"):
        from_recipe.source_of(recipe(source=str(a)), toy())


@pytest.mark.parametrize("name", REFUSED)
def test_prompts_and_tables_in_another_encoding_are_refused(tmp_path, name):
    (tmp_path / "p.txt").write_bytes(REFUSED[name])
    (tmp_path / "p.csv").write_bytes(REFUSED[name])
    for place in ("p.txt", "p.csv:text"):
        with refused("data.prompts", place.partition(":")[0], "UTF-8"):
            list_prompts(str(tmp_path / place))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_end_at_newlines_and_nowhere_else(tmp_path, coding, end):
    words = ["a\u2028b", "c\u2029d", "e\x0bf", "g\x0ch", "i\x85j", "\ufeffk"]
    file = tmp_path / "p.txt"
    file.write_bytes((end.join(words) + end).encode(coding))
    prompts = [i.prompt for i in list_prompts(str(file)).items]
    assert prompts == [*words[:-1], "k"]  # a mark within a file, of files put together, goes too
    rows = end.join(["text", *words[:2]])
    (tmp_path / "p.csv").write_bytes(rows.encode(coding))
    assert [i.prompt for i in list_prompts(f"{tmp_path / 'p.csv'}:text").items] == words[:2]
    lines = end.join(json.dumps({"text": w}, ensure_ascii=False) for w in words[:2])
    (tmp_path / "p.jsonl").write_bytes(lines.encode(coding))
    assert [i.prompt for i in list_prompts(f"{tmp_path / 'p.jsonl'}:text").items] == words[:2]


def test_a_carriage_return_alone_ends_no_line_and_is_bad(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"one\ntwo\rthree\nfour\n")
    listing = list_prompts(str(tmp_path / "p.txt"))
    assert [i.prompt for i in listing.items] == ["one", "four"]
    assert [b.name for b in listing.bad] == [f"{tmp_path / 'p.txt'}:2"]


def test_lines_are_those_that_an_editor_shows():
    assert text.lines("") == []
    assert text.lines("a") == text.lines("a\n") == ["a"]
    assert text.lines("a\n\nb\u2028c\n") == ["a", "", "b\u2028c"]


CELLS = {"none": None, "number": 5, "list": ["a", "b"], "mapping": {"en": "a"}, "truth": True}


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_or_a_key_that_is_no_text_is_bad_by_its_row(tmp_path, name):
    rows = [{"text": "good", "image": "0.png"}, {"text": CELLS[name], "image": "1.png"}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    table = f"{tmp_path / 'p.json'}"
    a = folder_of(tmp_path / "a", 1, captioned=False)
    (a / "000.json").write_text(json.dumps({"text": CELLS[name]}))
    listings = {
        f"{table}[1]": [list_prompts(f"{table}:text"),
                        list_images(f"{table}:image", "text", 0, True)],
        str(a / "000.png"): [list_images(str(a), None, 0, True)],
    }  # fmt: skip
    for place, found in listings.items():
        for listing in found:
            (bad,) = listing.bad
            assert bad.name == place
            assert bad.kind == ("empty caption" if CELLS[name] is None else "no caption")
            assert CELLS[name] is None or f"of type {type(CELLS[name]).__name__}" in bad.reason


def test_a_sidecar_that_is_no_json_or_lacks_the_key_says_so(tmp_path):
    a = folder_of(tmp_path / "a", 2, captioned=False)
    (a / "000.json").write_text("{'caption': 1}")
    (a / "001.json").write_text('{"title": "x"}')
    first, second = list_images(str(a), None, 0, True).bad
    assert "000.json is not valid JSON" in first.reason
    assert second.reason == "001.json holds no 'caption' or 'text' or 'prompt'"


@pytest.mark.parametrize("memory", [4.0, 0.0])
def test_half_a_character_is_a_bad_item_and_the_rest_is_read(tmp_path, memory):
    rows = "".join(f'{{"text": "word {i}"}}\n' for i in range(9)) + '{"text": "a \\ud83d"}\n'
    (tmp_path / "p.jsonl").write_text(rows)
    data = {"prompts": f"{tmp_path / 'p.jsonl'}:text", "cache": str(tmp_path / "c"),
            "in_memory_gb": memory}  # fmt: skip
    source = from_recipe.source_of(recipe("sid", **data, skip_share=0.1), toy())
    assert source.size == 9
    assert source.report["by_kind"] == {"lone surrogate": 1}
    assert source.report["files"][0]["name"] == f"{tmp_path / 'p.jsonl'}[9]"
    with refused("data.prompts", "p.jsonl[9]", "\\ud83d"):
        from_recipe.source_of(recipe("sid", **data), toy())


@pytest.mark.parametrize("memory", [4.0, 0.0])
def test_a_file_name_of_no_encoding_is_reported_and_harms_nothing(tmp_path, memory):
    a = folder_of(tmp_path / "a", 9)
    strange = b"/caf\xe9.png"
    with open(bytes(a) + strange, "wb") as file:
        file.write(b"no image")
    with open(bytes(a) + strange[:-3] + b"txt", "wb") as file:
        file.write(b"words")
    data = {"source": str(a), "cache": str(tmp_path / "c"), "in_memory_gb": memory}
    source = from_recipe.source_of(recipe(**data, skip_share=0.1), toy())
    assert source.size == 9 and source.report["skipped"] == 1
    if not memory:
        kept = json.loads(next((tmp_path / "c").glob(f"*/{REPORT}")).read_text())
        assert kept == source.report


def test_benchmarks_and_protocols_read_their_prompts_so(tmp_path, monkeypatch):
    line = json.dumps({"prompt": "a\u2028cat"}, ensure_ascii=False) + "\r\n"
    (tmp_path / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() * 2)
    asked = prompt_benchmarks.geneval_prompts(tmp_path / "m.jsonl")
    assert [v.prompt for v in asked] == ["a\u2028cat"] * 2
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x.txt").write_bytes("猫".encode("utf-16"))
    (tmp_path / "d/._x.txt").write_bytes(b"\x00\xff")
    assert [(v.name, v.prompt) for v in prompt_benchmarks.dpg_prompts(tmp_path / "d")] == [
        ("x", "猫")
    ]
    (tmp_path / "d/y.txt").write_bytes(b"K\xf6ln")
    with pytest.raises(MetricError, match=r"y\.txt is not UTF-8 text .*save it as UTF-8"):
        prompt_benchmarks.dpg_prompts(tmp_path / "d")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    (tmp_path / "captions").mkdir()
    file = tmp_path / "captions/c.txt"
    file.write_bytes("\ufeffa\u2028b\nc\n".encode())
    captions = spec.Captions(source="captions", file="c.txt", origin="somewhere")
    assert captions.read() == ["a\u2028b", "c"]
    file.write_bytes(b"K\xf6ln")
    with pytest.raises(MetricError, match="save it as UTF-8"):
        captions.read()


def test_shards_without_a_caption_in_text_keep_the_good_samples(tmp_path):
    tar_of(tmp_path / "s.tar", [("0.png", png(0)), ("0.json", b"\xff"), ("1.png", png(1)),
                                ("1.txt", b"fine")])  # fmt: skip
    listing = list_images(str(tmp_path / "s.tar"), None, 0, True)
    assert [i.prompt for i in listing.items] == ["fine"]
    assert listing.bad[0].name == f"{tmp_path}/s.tar/0"
