"""The header of a safetensors file: read without loading a weight, and rewritten in place.

A file is 8 bytes (the header's length, little endian), the header (JSON, padded with spaces), and
the data section. The header has one entry a tensor (dtype, shape, place in the data section) and
`__metadata__`, a map of strings.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from teachers.errors import UserError, clipped

LONGEST = 100_000_000  # bytes of a header that safetensors reads
CHUNK = 1 << 22
METADATA = "__metadata__"
# How files that are no safetensors begin. None of them is opened further.
OTHERS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x80": "a pickle",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
}
PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"}


class TensorInfo(NamedTuple):
    """A tensor's dtype, as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """A header: its metadata, its tensors by name, and where the data section starts."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    start: int


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Pickles are refused and never read.

    Raises:
        UserError: there is no such file, it is of another kind, or its header is damaged.
    """
    tree, length = read_tree(path)
    metadata = tree.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "its __metadata__ is not a map of strings")
    tensors, ends = {}, [0]
    for name, entry in tree.items():
        try:
            begin, end = entry["data_offsets"]
            shape = tuple(int(n) for n in entry["shape"])
            tensors[name] = TensorInfo(str(entry["dtype"]), shape)
            ends.append(int(end))
            valid = 0 <= int(begin) <= int(end)
        except (KeyError, TypeError, ValueError, OverflowError):
            valid = False
        if not valid:
            raise damaged(path, f"the entry of {clipped(name)!r} is malformed")
    data = path.stat().st_size - length - 8
    if max(ends) != data:
        raise damaged(path, f"its tensors need {max(ends)} bytes and the file holds {data}")
    return Header(metadata, tensors, length + 8)


def read_tree(path: Path) -> tuple[dict[str, Any], int]:
    """The header's JSON, and its length in bytes.

    Raises:
        UserError: as `read_header`.
    """
    try:
        with path.open("rb") as file:
            first = file.read(32)
            refuse_other_kinds(path, first)
            (length,) = struct.unpack("<Q", first[:8]) if len(first) >= 8 else (0,)
            size = path.stat().st_size
            if not 2 <= length <= min(LONGEST, size - 8):
                if path.suffix != ".safetensors":
                    raise UserError(f"{path}: it is no safetensors file")
                raise damaged(path, f"its header cannot have {length} bytes in a file of {size}")
            file.seek(8)
            text = file.read(length)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a .safetensors file") from None
    except OSError as error:  # for example a folder
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give a .safetensors file"
        ) from None
    try:
        tree = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise damaged(path, "its header is not valid JSON") from None
    if not isinstance(tree, dict):
        raise damaged(path, "its header is not a JSON object")
    return tree, length


def refuse_other_kinds(path: Path, first: bytes) -> None:
    """Refuse a file that its first bytes or its name say is no safetensors file.

    Raises:
        UserError: it is one.
    """
    # a safetensors header begins with "{" after its length
    if first[8:9] == b"{":
        return
    kind = next((v for k, v in OTHERS.items() if first.startswith(k)), None)
    if kind is None and path.suffix.lower() in PICKLES:
        kind = "a pickle by its name"
    if kind is not None:
        raise UserError(
            f"{path}: {kind}, and such files are not opened; give a .safetensors file of the model"
        )


def damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path}: not a whole safetensors file: {why}; download or export it again")


def replace_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Replace a file's metadata without moving its data: the new header is padded with spaces.

    Keys are written in order, so that equal files have equal bytes; safetensors writes them in an
    order of chance.

    Raises:
        ValueError: the new header is longer than the old one.
    """
    tree, length = read_tree(path)
    tree[METADATA] = dict(sorted(metadata.items()))
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    if len(text) > length:
        raise ValueError(f"{path}: a header of {len(text)} bytes does not fit into {length}")
    with path.open("r+b") as file:
        file.seek(8)
        file.write(text.ljust(length))


def data_sha256(paths: Iterable[Path]) -> str:
    """SHA-256 of the data sections of these files, in the order of their names.

    It does not depend on headers, so a file with other metadata has the same hash.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        _, length = read_tree(path)
        with path.open("rb") as file:
            file.seek(8 + length)
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
