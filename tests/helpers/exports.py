"""Students of small pipelines, exported and checked in this process, which takes a second."""

from __future__ import annotations

import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors.torch import load_file

from students import schedulers
from students.export import folder, formats
from students.export.lora_files import export_lora
from students.lora import Adapter
from teachers import load
from tests.helpers import families
from tests.helpers.disturbed import disturbed

RECIPE: dict[str, Any] = {"objective": {"name": "dmd2"}, "train": {"steps": 10}}


def drawn_here(jobs, kind, base, counts, arguments):
    """What `formats.drawn_elsewhere` returns, by the same script in this process."""
    import json

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "images.safetensors"
        index = json.loads((base / "model_index.json").read_text())
        absent = [k for k, v in index.items() if isinstance(v, list) and v[0] is None]
        plain = [json.dumps(v) for v in (dict(arguments), jobs, list(counts), absent)]
        with patch.object(sys, "argv", ["-c", str(base), str(out), kind, *plain]):
            exec(formats.SCRIPT, {})
        return load_file(out)


@contextmanager
def in_this_process():
    """Within it, LoRA files and single files are checked here, and folders are not."""
    with (
        patch.object(formats, "drawn_elsewhere", drawn_here),
        patch.object(folder, "verify", lambda *_: None),
    ):
        yield


def exported(name: str, root: Path, renoise: bool = True, steps: int = 4) -> Path:
    """A folder with `teacher`, `student` and `lora` of a student of this family."""
    source = families.build(name, root / "teacher")
    teacher = load(str(source), **families.OPTIONS.get(name, {}))
    adapter = Adapter(rank=4, alpha=8.0)
    student = disturbed(schedulers.student(teacher, steps, None, renoise, adapter)).eval()
    with in_this_process():
        folder.export(student, teacher, root / "student", RECIPE)
        export_lora(student, teacher, root / "student", root / "lora", licence="mit")
    return root
