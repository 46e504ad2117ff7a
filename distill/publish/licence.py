"""The licence of a teacher, which its student inherits, and whether it permits sharing one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from teachers.errors import UserError
from teachers.storage.files import home, read_json
from teachers.teacher import EMBEDDED, TERMS

HUB = "https://huggingface.co"

# Licences by a pattern in their text, for folders without other metadata; the first match counts.
TEXTS = {
    r"Attribution-NonCommercial-NoDerivatives 4\.0": "cc-by-nc-nd-4.0",
    r"Attribution-NoDerivatives 4\.0": "cc-by-nd-4.0",
    r"Attribution-NonCommercial-ShareAlike 4\.0": "cc-by-nc-sa-4.0",
    r"Attribution-NonCommercial 4\.0": "cc-by-nc-4.0",
    r"CreativeML Open RAIL\+\+-M": "openrail++",
    r"CreativeML Open RAIL-M": "creativeml-openrail-m",
    r"Apache License\s+Version 2\.0": "apache-2.0",
    r"MIT License": "mit",
}

# Words in a licence's id, or in its name under `license: other`, that forbid derivatives.
FORBIDS = re.compile(
    r"(^|[-_ .])(nd|no-?derivatives?|no-?derivs?|all-rights-reserved|proprietary|evaluation-only)"
    r"($|[-_ .])"
)

# The lines on the licence in front matter that is not valid YAML, and the values that mean none.
LICENCE_LINE = re.compile(
    r"^(license(?:_name|_link)?):[ \t]*"
    r"[\"']?([^\s\"'#\[{|>&*!][^\"'#\r\n]*?)[\"' \t\r]*(?:#.*)?$",
    re.M,
)
NULLS = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class Licence:
    """A model's licence in the Hub's terms; `id` is None if none is stated."""

    id: str | None = None
    name: str | None = None  # of a licence whose id is "other"
    link: str | None = None
    file: Path | None = None  # its text, if the model's folder has one

    @property
    def forbids(self) -> bool:
        """Whether it forbids sharing derivatives of the model."""
        words = [w.lower().replace(" ", "-") for w in (self.id, self.name) if w]
        return any(FORBIDS.search(w) for w in words)

    @property
    def label(self) -> str:
        """What messages and cards call it."""
        return (self.name if self.id == "other" and self.name else self.id) or "not stated"


def licence_of(source: str) -> Licence:
    """The licence of the teacher at `source`: its README's front matter, index, or LICENSE file.

    Args:
        source: As in a recipe's `teacher.source`. For a Hub id, these files are downloaded; if they
            cannot be, the licence counts as not stated.
    """
    folder = folder_of(source) or download_terms(source)
    if folder is None:
        return Licence()
    index = folder / "model_index.json"
    fields = read_json(index, f"teacher {source!r}") if index.is_file() else {}
    files = [p for p in sorted(folder.glob("LICEN[SC]E*")) if p.is_file()]
    readme = folder / "README.md"
    text = readme.read_text(errors="replace", encoding="utf-8") if readme.is_file() else ""
    return parse_licence(text, fields, files[0] if files else None, hub_id(source))


def parse_licence(
    readme: str, index: Mapping[str, Any], file: Path | None, repo: str | None
) -> Licence:
    """The licence that a README's front matter, else model_index.json, else a LICENSE file states.

    Args:
        repo: The Hub id that a relative `license_link` is in; None for a local folder.
    """
    front = front_matter(readme)
    stated = front.get("license") or index.get("license")
    if isinstance(stated, list):
        stated = strictest(stated)
    if not stated:
        return Licence() if file is None else recognise(file)
    name, link = front.get("license_name"), front.get("license_link")
    if isinstance(link, str) and "://" not in link and repo is not None:
        link = f"{HUB}/{repo}/blob/main/{link.removeprefix('./')}"
    return Licence(str(stated), name and str(name), link and str(link), file)


def strictest(ids: list[Any]) -> Any:
    """Of several licences that all apply: the first that forbids derivatives, else the first."""
    return next((v for v in ids if Licence(str(v)).forbids), ids[0] if ids else None)


def recognise(file: Path) -> Licence:
    """The licence whose text is in a file."""
    text = file.read_text(errors="replace", encoding="utf-8")
    known = next((v for k, v in TEXTS.items() if re.search(k, text, re.IGNORECASE)), None)
    if known is None:
        return Licence("other", "see-licence", None, file)
    return Licence(known, None, None, file)


def check_licence(source: str, override: str = "") -> Licence:
    """The teacher's licence, which its student inherits.

    Args:
        override: Why the student may be shared nevertheless, such as a written permission; the
            card repeats it.

    Raises:
        UserError: the licence forbids sharing derivatives, and `override` is empty.
    """
    licence = licence_of(source)
    if licence.forbids and not override.strip():
        raise UserError(
            f"teacher {source!r}: its licence ({licence.label}) forbids sharing what is derived "
            "from it; if the owner permits it, give the reason: --licence-override REASON, or in a "
            "recipe's export.licence_override"
        )
    return licence


def front_matter(readme: str) -> dict[str, Any]:
    """The YAML front matter of a README, every scalar as a string; empty if there is none.

    If the front matter is not valid YAML, only its lines on the licence are read.
    """
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", readme, re.DOTALL)
    if match is None:
        return {}
    try:
        fields = yaml.load(match[1], Loader=yaml.BaseLoader)  # reads every scalar as a string
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        fields = dict(LICENCE_LINE.findall(match[1]))
    if not isinstance(fields, dict):
        return {}
    return {k: v for k, v in fields.items() if isinstance(k, str) and v not in NULLS}


def folder_of(source: str) -> Path | None:
    """The teacher's folder on this machine; None if it has none."""
    folder = EMBEDDED.get(source) or home(source, "teacher")
    return folder if folder.is_dir() else None


def download_terms(source: str) -> Path | None:
    """A folder with a Hub model's README and licence files, from the Hub or the local cache.

    Returns:
        None if `source` is no Hub id, or neither place has the files.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if hub_id(source) is None:
        return None
    had_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return Path(snapshot_download(source, allow_patterns=list(TERMS)))
    except (HTTPError, OSError, ValueError):
        return None
    finally:
        if had_bars:
            enable_progress_bars()


def hub_id(source: str) -> str | None:
    """The Hub id of a teacher; None for a local folder or a shipped teacher."""
    if folder_of(source) is not None or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        return None
    return source
