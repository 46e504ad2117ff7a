"""The source of an exported SiT, LightningDiT or U-ViT, and of its scheduler, for diffusers.

Diffusers has no class for these networks, but takes a pipeline's part from a module in the part's
folder, once `trust_remote_code=True` allows it. `DiTPipeline` calls a method of its scheduler that
the rectified flow's lacks, so the scheduler of flows comes with its source too.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from teachers.imagenet import parts, schedule
from teachers.reduced.source import body

HEADER = '''"""{what} of a few-step student ({paper}); Apache-2.0.

Load the whole folder: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).
"""
'''
PAPERS = {
    "SiTModel": "arXiv:2401.08740",
    "LightningDiTModel": "arXiv:2501.01423",
    "UViTModel": "arXiv:2209.12152",
}


def write(folder: Path, pipe: Any) -> None:
    """Make the pipeline saved in `folder` one that loads without our packages."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    kind = type(pipe.transformer)
    paper = PAPERS[kind.__name__]
    name = kind.__name__.lower()
    text = source(HEADER.format(what="The network", paper=paper), parts, inspect.getmodule(kind))
    (folder / "transformer" / f"{name}.py").write_text(text, encoding="utf-8")
    index["transformer"] = [name, kind.__name__]
    if isinstance(pipe.scheduler, schedule.FlowEuler):
        text = source(HEADER.format(what="The scheduler", paper=paper), schedule)
        (folder / "scheduler" / "flow_euler.py").write_text(text, encoding="utf-8")
        index["scheduler"] = ["flow_euler", "FlowEuler"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def source(header: str, *modules: Any) -> str:
    """One module with the bodies of several of ours."""
    imports: dict[str, None] = {}  # a set that keeps their order
    bodies = [body(module, imports) for module in modules]
    first = [line for line in imports if line.startswith("from __future__")]
    rest = [line for line in imports if line not in first]
    return "\n\n".join([header + "\n".join(first), "\n".join(rest), *bodies]) + "\n"
