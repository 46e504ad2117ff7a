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
from teachers.errors import UserError, clipped, first_line, nearest

TEXTS = {".csv", ".tsv", ".jsonl", ".json"}  # read without any package
SUFFIXES = TEXTS | {".parquet"}
SAVED = ("state.json", "dataset_info.json", "dataset_dict.json")  # by Dataset.save_to_disk


class Table(ABC):
    """Rows and named columns.

    name: Of the file or dataset, for messages.
    columns: The columns' names.
    contents: What the rows are read from: the file, or a fingerprint.
    root: The folder that paths in cells are relative to.
    size: The number of rows.
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
        """A whole column, in memory: for captions and labels."""

    def numbered(self, column: str) -> dict[str, int]:
        """The label numbers by name of a column that defines them; empty for any other."""
        return {}

    def check_column(self, column: str, where: str) -> None:
        """Refuse a column that the table does not have."""
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
            raise missing_package(where) from None
        self.name, self.contents, self.root = str(file), file, file.parent
        try:
            self.file = parquet.ParquetFile(file)
        except (ArrowException, OSError) as error:
            raise UserError(
                f"{where}: {file} cannot be read ({first_line(error)}); correct it"
            ) from None
        self.columns = self.file.schema_arrow.names
        if (name := repeated(self.columns)) is not None:
            raise UserError(f"{where}: {file}: two columns are named {name!r}; rename one")
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
            raise missing_package(where) from None
        self.name = name
        folder = Path(name).expanduser()
        try:
            if any((folder / file).exists() for file in SAVED):
                data = datasets.load_from_disk(str(folder))
            else:
                data = datasets.load_dataset(str(folder) if folder.exists() else name, split=split)
        except Exception as error:  # datasets and huggingface_hub raise over twenty types
            reason = first_line(error)
            raise UserError(
                f"{where}: dataset {name!r} cannot be read ({reason}); check its name and files"
            ) from None
        if isinstance(data, dict):
            if split not in data:
                raise UserError(f"{where}: no split {split!r}; {nearest(split, data)}")
            data = data[split]
        self.names = {
            k: {name: label for label, name in enumerate(v.names)}
            for k, v in data.features.items()
            if isinstance(v, datasets.ClassLabel)
        }
        for column, kind in data.features.items():  # undecoded, so that we can name bad images
            if isinstance(kind, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
        self.data, self.columns, self.size = data, data.column_names, len(data)
        self.contents = f"{name}@{split}:{data._fingerprint}"

    def cell(self, row: int, column: str) -> Any:
        return self.data.select_columns([column])[row][column]

    def numbered(self, column: str) -> dict[str, int]:
        return self.names.get(column, {})

    def values(self, column: str) -> list[Any]:
        return list(self.data.select_columns([column])[:][column])


def open_table(name: str, split: str, where: str) -> Table:
    """A table by its file (.csv, .tsv, .jsonl, .json, .parquet), its folder, or its Hub id.

    Raises:
        UserError: it does not exist or cannot be read, or the package that reads it is missing.
    """
    file = file_of(name, where)
    if (kind := kind_of(file)) in TEXTS:
        return Rows(file, where)
    return Parquet(file, where) if kind == ".parquet" else Arrow(name, split, where)


@contextmanager
def check_place(key: str, place: object) -> Iterator[None]:
    """Within it, a path that the system cannot look up is an error of this key.

    Raises:
        UserError: the path is too long, or a folder in it cannot be entered.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"{key}: {clipped(str(place))!r} is no path that can be looked up ({reason}); "
            "give an existing file or folder"
        ) from None


def kind_of(file: Path) -> str:
    """A file's suffix in lower case, which says its kind."""
    return file.suffix.lower()


def file_of(name: str, where: str) -> Path:
    """The path of a table that is not a dataset of the Hub.

    Raises:
        UserError: the name is that of a file or folder, which does not exist.
    """
    file = Path(name).expanduser()
    if kind_of(file) in SUFFIXES and not file.is_file():
        raise UserError(f"{where}: no such file: {name}; give an existing one")
    if name.startswith(("/", "~", ".")) and not file.exists():
        raise UserError(f"{where}: no such folder: {name}; give an existing one")
    return file


def parse_column(place: str, refusal: str) -> Column:
    """The table and the column in "DATASET:COLUMN".

    Raises:
        UserError: the text does not have that form; its message is `refusal`.
    """
    name, colon, column = place.rpartition(":")
    if not colon or not name or not column:
        raise UserError(refusal)
    return Column(hf=name, column=column)


def existing_table(column: Column, key: str) -> Column:
    """The column of a recipe's key, if its table exists; the Hub is not asked.

    Raises:
        UserError: its table is a file or a folder, which does not exist.
    """
    file_of(column.hf, f"{key}: '{column.hf}:{column.column}'")
    return column


def missing_package(where: str) -> UserError:
    return UserError(f"{where}: this needs the package 'datasets'; run pip install 'fewstep[data]'")
