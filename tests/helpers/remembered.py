"""Networks that were read from a folder once are copied, for as long as its files are the same.

Tests load the same small pipelines some two thousand times. To read a network takes diffusers and
transformers five times as long as to copy one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from teachers.storage import components, variants

MOST = 64  # networks that are kept


def stamp(folder: Path) -> tuple[Any, ...]:
    """What changes when a file of the folder does."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return tuple((str(p), s.st_size, s.st_mtime_ns) for p in files for s in [p.stat()])


@contextmanager
def remembered() -> Iterator[None]:
    """Within it, `components.module` reads what it has read before from memory."""
    real, kept = components.module, OrderedDict[Any, Any]()

    def module(kind: Any, folder: Path, who: str, part: str = "", **options: Any) -> Any:
        asked = variants._ASKED.get()  # what a folder of several is read for
        key = (kind, str(folder), part, asked, repr(sorted(options.items())), stamp(Path(folder)))
        if key not in kept:
            made = real(kind, folder, who, part, **options)
            if any(p.is_meta for p in made.parameters()) or hasattr(made, "hf_quantizer"):
                return made
            kept[key] = made
            if len(kept) > MOST:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return deepcopy(kept[key])

    components.module = module
    try:
        yield
    finally:
        components.module = real
