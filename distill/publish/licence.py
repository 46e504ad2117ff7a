"""The licence of a teacher, which its student inherits, and whether it lets one be shared."""

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

# What a licence is known by in its text, where a folder holds only that; the first that fits.
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

# Words of a licence's identifier or, under `license: other`, of its name, that forbid derivatives.
FORBIDS = re.compile(
    r"(^|[-_ .])(nd|no-?derivatives?|no-?derivs?|all-rights-reserved|proprietary|evaluation-only)"
    r"($|[-_ .])"
)

# Lines of front matter that say it, and what stands there for nothing.
BARE = re.compile(
    r"^(license(?:_name|_link)?):[ \t]*"
    r"[\"']?([^\s\"'#\[{|>&*!][^\"'#\r\n]*?)[\"' \t\r]*(?:#.*)?$",
    re.M,
)
NULLS = ("", "~", "null", "Null", "NULL")


@dataclass(frozen=True)
class Licence:
    """A model's licence in the Hub's terms; `id` is None where none is stated."""

    id: str | None = None
    name: str | None = None  # with id "other": what it calls itself
    link: str | None = None
    file: Path | None = None  # its text, when the model's folder has it

    @property
    def forbids(self) -> bool:
        """Whether it lets nobody share what is derived from the model."""
        words = [w.lower().replace(" ", "-") for w in (self.id, self.name) if w]
        return any(FORBIDS.search(w) for w in words)

    @property
    def called(self) -> str:
        return (self.name if self.id == "other" and self.name else self.id) or "not stated"


def licence_of(source: str) -> Licence:
    """The licence of the teacher at `source`: its README's front matter, index, or LICENSE file.

    Args:
        source: What recipes name as `teacher.source`; of a Hub id these files are fetched, and no
            licence is known where they cannot be.
    """
    folder = folder_of(source) or fetched(source)
    if folder is None:
        return Licence()
    index = folder / "model_index.json"
    about = read_json(index, f"teacher {source!r}") if index.is_file() else {}
    texts = [p for p in sorted(folder.glob("LICEN[SC]E*")) if p.is_file()]
    readme = folder / "README.md"
    text = readme.read_text(errors="replace", encoding="utf-8") if readme.is_file() else ""
    return licence_in(text, about, texts[0] if texts else None, hub_id(source))


def licence_in(
    readme: str, index: Mapping[str, Any], file: Path | None, base: str | None
) -> Licence:
    """The licence that these say, the README first."""
    front = front_matter(readme)
    found = front.get("license") or index.get("license")
    if isinstance(found, list):  # several apply: one that forbids decides
        found = next((v for v in found if Licence(str(v)).forbids), found[0] if found else None)
    if found:
        link = front.get("license_link")
        if isinstance(link, str) and "://" not in link and base is not None:
            link = f"{HUB}/{base}/blob/main/{link.removeprefix('./')}"
        name = front.get("license_name")
        return Licence(str(found), name and str(name), link and str(link), file)
    if file is None:
        return Licence()
    text = file.read_text(errors="replace", encoding="utf-8")
    known = next((v for k, v in TEXTS.items() if re.search(k, text, re.IGNORECASE)), None)
    return (
        Licence(known, None, None, file) if known else Licence("other", "see-licence", None, file)
    )


def check_licence(source: str, override: str = "") -> Licence:
    """The teacher's licence, which its student inherits.

    Args:
        override: Why the student may be shared all the same, such as a permission in writing;
            the card repeats it.

    Raises:
        UserError: the licence forbids sharing derivatives, and no reason is given.
    """
    licence = licence_of(source)
    if licence.forbids and not override.strip():
        raise UserError(
            f"teacher {source!r}: its licence ({licence.called}) forbids sharing what is derived "
            "from it; with the owner's permission, say so by --licence-override REASON, or in a "
            "recipe's export.licence_override"
        )
    return licence


def front_matter(readme: str) -> dict[str, Any]:
    """The YAML between a README's first two --- lines, every scalar a string; empty if there is
    none, and the lines on the licence alone where it is not YAML."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", readme, re.DOTALL)
    if match is None:
        return {}
    try:
        found = yaml.load(match[1], Loader=yaml.BaseLoader)  # of strings alone
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        found = dict(BARE.findall(match[1]))
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(k, str) and v not in NULLS}


def folder_of(source: str) -> Path | None:
    """The teacher's local folder, if it has one."""
    folder = EMBEDDED.get(source) or home(source, "teacher")
    return folder if folder.is_dir() else None


def fetched(source: str) -> Path | None:
    """The folder with a Hub model's README and licence, from the Hub or the cache; None where
    neither has it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if hub_id(source) is None:
        return None
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        return Path(snapshot_download(source, allow_patterns=list(TERMS)))
    except (HTTPError, OSError, ValueError):
        return None
    finally:
        if shown:
            enable_progress_bars()


def hub_id(source: str) -> str | None:
    """The Hub id of a teacher; None for local folders and embedded ones."""
    if folder_of(source) is not None or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        return None
    return source
