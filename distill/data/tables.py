"""Tables of prompts and images: CSV, JSON lines, Parquet, and Hugging Face datasets."""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill.config.schema import Column
from eval.text import csv_rows, decoded, json_rows, json_value, repeated
from teachers.errors import UserError, clipped, nearest

TEXTS = {".csv", ".tsv", ".jsonl", ".json"}  # read without any package
SUFFIXES = TEXTS | {".parquet"}
SAVED = ("state.json", "dataset_info.json", "dataset_dict.json")  # by Dataset.save_to_disk


class Table(ABC):
    """Rows and named columns.

    name: of the file or dataset, for messages.
    columns: their names.
    contents: what the rows are: the file, or a fingerprint.
    root: what a path in a cell is relative to.
    """

    name: str
    columns: list[str]
    contents: Path | str
    root: Path = Path()
    size: int

    @abstractmethod
    def cell(self, row: int, column: str) -> Any:
        """One value."""

    @abstractmethod
    def values(self, column: str) -> list[Any]:
        """A whole column, which must fit in memory: for captions and labels."""

    def numbered(self, column: str) -> dict[str, int]:
        """The labels by name that a column of labels brings with it; nothing for any other."""
        return {}

    def need(self, column: str, where: str) -> None:
        """Refuse a column that is not there."""
        if column not in self.columns:
            raise UserError(f"{where}: no column {column!r}; {nearest(column, self.columns)}")


class Rows(Table):
    """A CSV, TSV, JSON or JSON-lines file, in memory."""

    def __init__(self, file: Path, where: str) -> None:
        self.name, self.contents, self.root = str(file), file, file.parent
        try:
            self.rows = list(_rows(file))
        except (ValueError, RecursionError, OSError) as error:
            raise UserError(f"{where}: {file} cannot be read ({error}); correct it") from None
        self.columns = list({k: None for row in self.rows for k in row if isinstance(k, str)})
        self.size = len(self.rows)

    def cell(self, row: int, column: str) -> Any:
        return self.rows[row].get(column)

    def values(self, column: str) -> list[Any]:
        return [row.get(column) for row in self.rows]


def _rows(file: Path) -> list[dict[str, Any]]:
    text, kind = decoded(file.read_bytes()), kind_of(file)
    if kind == ".jsonl":
        return list(json_rows(text))
    if kind != ".json":
        return list(csv_rows(text, "\t" if kind == ".tsv" else ","))
    rows = json_value(text)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("expected JSON objects, one for each row")
    return rows


class Parquet(Table):
    """A Parquet file, read a row group at a time."""

    def __init__(self, file: Path, where: str) -> None:
        try:
            from pyarrow import ArrowException, parquet  # pyright: ignore
        except ImportError:
            raise missing(where) from None
        self.name, self.contents, self.root = str(file), file, file.parent
        try:
            self.file = parquet.ParquetFile(file)
        except (ArrowException, OSError) as error:
            raise UserError(
                f"{where}: {file} cannot be read ({first_line(error)}); correct it"
            ) from None
        self.columns = self.file.schema_arrow.names
        if (twice := repeated(self.columns)) is not None:
            raise UserError(f"{where}: {file}: two columns are named {twice!r}; rename one")
        groups = range(self.file.num_row_groups)
        rows = [self.file.metadata.row_group(g).num_rows for g in groups]
        self.starts = [sum(rows[:g]) for g in groups]
        self.size = sum(rows)
        self._group = lru_cache(2)(self._read)

    def _read(self, group: int, column: str) -> Any:
        return self.file.read_row_group(group, columns=[column]).column(column)

    def cell(self, row: int, column: str) -> Any:
        group = bisect.bisect_right(self.starts, row) - 1
        return self._group(group, column)[row - self.starts[group]].as_py()

    def values(self, column: str) -> list[Any]:
        return self.file.read(columns=[column]).column(column).to_pylist()


class Arrow(Table):
    """A dataset of the Hub, or one that `Dataset.save_to_disk` wrote."""

    def __init__(self, name: str, split: str, where: str) -> None:
        try:
            import datasets  # pyright: ignore
        except ImportError:
            raise missing(where) from None
        self.name = name
        folder = Path(name).expanduser()
        saved = any((folder / file).exists() for file in SAVED)
        try:
            if saved:
                found = datasets.load_from_disk(str(folder))
            else:
                found = datasets.load_dataset(str(folder) if folder.exists() else name, split=split)
        except Exception as error:  # datasets and huggingface_hub raise over twenty types
            reason = first_line(error)
            raise UserError(f"{where}: dataset {name!r} cannot be read ({reason})") from None
        if isinstance(found, dict):
            if split not in found:
                raise UserError(f"{where}: no split {split!r}; {nearest(split, found)}")
            found = found[split]
        self.names = {
            k: {name: label for label, name in enumerate(v.names)}
            for k, v in found.features.items()
            if isinstance(v, datasets.ClassLabel)
        }
        for column, kind in found.features.items():  # bytes as they are: bad ones are ours to name
            if isinstance(kind, datasets.Image):
                found = found.cast_column(column, datasets.Image(decode=False))
        self.data, self.columns, self.size = found, found.column_names, len(found)
        self.contents = f"{name}@{split}:{found._fingerprint}"

    def cell(self, row: int, column: str) -> Any:
        return self.data.select_columns([column])[row][column]

    def numbered(self, column: str) -> dict[str, int]:
        return self.names.get(column, {})

    def values(self, column: str) -> list[Any]:
        return list(self.data.select_columns([column])[:][column])


def open_table(name: str, split: str, where: str) -> Table:
    """A table by its file (.csv, .tsv, .jsonl, .json, .parquet), its folder, or its Hub id.

    Raises:
        UserError: it is not there or not readable, or the package that reads it is missing.
    """
    file = file_of(name, where)
    if (kind := kind_of(file)) in TEXTS:
        return Rows(file, where)
    return Parquet(file, where) if kind == ".parquet" else Arrow(name, split, where)


@contextmanager
def lookup(key: str, place: object) -> Iterator[None]:
    """Look for what a recipe's key names.

    Raises:
        UserError: the system cannot look there, as the name is too long or a folder is closed.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of a user whom there is not
        why = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"{key}: {clipped(str(place))!r} is no path that can be looked up ({why}); "
            "give a file or a folder that is there"
        ) from None


def kind_of(file: Path) -> str:
    """A file's suffix, by which its kind is told; upper case means no other kind."""
    return file.suffix.lower()


def file_of(name: str, where: str) -> Path:
    """Where a table is, if it is no dataset of the Hub's.

    Raises:
        UserError: its name is a file's or a folder's, and there is none.
    """
    file = Path(name).expanduser()
    if kind_of(file) in SUFFIXES and not file.is_file():
        raise UserError(f"{where}: no such file: {name}; give one that is there")
    if name.startswith(("/", "~", ".")) and not file.exists():
        raise UserError(f"{where}: no such folder: {name}; give one that is there")
    return file


def column_in(place: str, refusal: str) -> Column:
    """The table and the column in "DATASET:COLUMN".

    Raises:
        UserError: the text is not of that form; it says `refusal`.
    """
    name, colon, column = place.rpartition(":")
    if not colon or not name or not column:
        raise UserError(refusal)
    return Column(hf=name, column=column)


def checked(column: Column, key: str) -> Column:
    """A recipe's column whose table is there, as far as can be told without asking the Hub.

    Raises:
        UserError: its table is a file or a folder, and there is none.
    """
    file_of(column.hf, f"{key}: '{column.hf}:{column.column}'")
    return column


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def missing(where: str) -> UserError:
    return UserError(
        f"{where}: this needs the package 'datasets'; install it by pip install 'fewstep[data]'"
    )
