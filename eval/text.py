"""Text files of users: encodings, ends of lines, JSON lines and CSV rows.

Both `eval` and `distill` use it. Text is read exactly or refused; no character is replaced or
dropped.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from typing import Any

MARK = "\ufeff"  # the byte-order mark, after decoding
REMEDY = "save it as UTF-8"


def decoded(content: bytes) -> str:
    """The text of bytes in UTF-8, with or without a byte-order mark, or in UTF-16 with one.

    Marks at the start are removed, and each \\r\\n becomes \\n.

    Raises:
        ValueError: they have another encoding; the message is a clause that ends in the remedy.
    """
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise ValueError(f"is UTF-32 and not UTF-8; {REMEDY}")
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    name = "UTF-16" if wide else "UTF-8"
    try:
        text = content.decode(name)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"is not {name} text (byte {error.start + 1} is {content[error.start]:#04x}); {REMEDY}"
        ) from None
    return text.lstrip(MARK).replace("\r\n", "\n")


def lines(text: str) -> list[str]:
    """The lines of decoded text, separated by \\n only.

    `str.splitlines` also splits at characters that a line may contain, such as U+2028. A \\n at the
    end of the text starts no further line.
    """
    return text.removesuffix("\n").split("\n") if text else []


def json_value(text: str) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: it is not valid JSON, or an object repeats a key (`json` would keep the last).
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def json_rows(text: str) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, without blank lines.

    Raises:
        ValueError: a line is not valid JSON, repeats a key, or is no object; the message names it.
    """
    for number, line in enumerate(lines(text), 1):
        if not line.strip():
            continue
        try:
            row = json_value(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not valid JSON ({error})") from None
        except RecursionError:
            raise ValueError(f"line {number} is not valid JSON (nested too deeply)") from None
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object; write one object a line")
        yield row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated([key for key, _ in pairs])) is not None:
        raise ValueError(f"the key {twice!r} is repeated; keep one")
    return dict(pairs)


def csv_rows(text: str, mark: str = ",") -> Iterator[dict[str, str | None]]:
    """The rows below the header of comma-separated values, as mappings.

    Columns without a name and blank rows are left out. A short row has None in its last columns.

    Raises:
        ValueError: a row has more values than the header has columns, as after a comma without
            quotes; a quote is not closed; a value is too long; or two columns have one name. The
            message names the line at which the row begins.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    header: list[str] | None = None
    first = 1
    try:
        for row in reader:
            if not row:
                pass
            elif header is None:
                header = row
                if (twice := repeated([name for name in header if name.strip()])) is not None:
                    raise ValueError(f"two columns are named {twice!r}; rename one")
                named = max((i for i, name in enumerate(row, 1) if name.strip()), default=0)
            else:
                if len(row) > len(header) or any(cell.strip() for cell in row[named:]):
                    raise ValueError(
                        f"the row of line {first} has {len(row)} values for {named} named columns; "
                        f"write a value that holds {_MARKS[mark]} in double quotes"
                    )
                cells = [*row, *[None] * (len(header) - len(row))]
                yield {k: v for k, v in zip(header, cells, strict=True) if k.strip()}
            first = reader.line_num + 1
    except csv.Error as error:
        if "field limit" in str(error):
            raise ValueError(
                f"the row of line {first} holds a value of more than {csv.field_size_limit():,} "
                "characters; shorten it, or close the double quote that it begins with"
            ) from None
        raise ValueError(
            f"the row of line {first} has no clear end ({error}); close each double quote, and "
            "write a quote inside a quoted value twice"
        ) from None


_MARKS = {",": "a comma", "\t": "a tab"}


def repeated(names: list[str]) -> str | None:
    """The first name that occurs twice; None if there is none."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)
