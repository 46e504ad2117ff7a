"""An exported EDM student's own network: its source, beside its weights, for diffusers to import.

Diffusers has no class for DDPM++, NCSN++ and EDM2, but it takes a pipeline's part from a module in
the part's folder, once `trust_remote_code=True` allows it. From the Hub it fetches no second file,
so all that the network needs is written into one. The pipeline stays ConsistencyModelPipeline; that
of latents, which also decodes, comes with its source too.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from teachers.edm import model as model_file
from teachers.edm import parts
from teachers.edm import pipeline as pipeline_file
from teachers.edm.latents import PIPELINE
from teachers.edm.model import EDMModel
from teachers.edm.pipeline import EDM2LatentsPipeline
from teachers.reduced.source import body

HEADER = '''"""The {what} of a few-step student (arXiv:2206.00364, arXiv:2312.02696); Apache-2.0.

Load the whole folder: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).
"""
'''


def write(folder: Path, pipe: Any) -> None:
    """Make the pipeline saved in `folder` one that loads without our packages."""
    model: EDMModel = pipe.unet
    # a name for each kind: diffusers gives modules of one name one namespace
    name = f"edm_{type(model.network).__name__.lower()}"
    (folder / "unet" / f"{name}.py").write_text(source(model), encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["unet"] = [name, EDMModel.__name__]
    if isinstance(pipe, EDM2LatentsPipeline):
        (folder / f"{PIPELINE[0]}.py").write_text(pipeline_source(), encoding="utf-8")
        index["_class_name"] = PIPELINE
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def source(model: EDMModel) -> str:
    """One module with EDMModel and this model's kind of network."""
    kind = type(model.network)
    family = inspect.getmodule(kind)
    assert family is not None
    imports: dict[str, None] = {}  # a set that keeps their order
    bodies = [body(module, imports) for module in (parts, family)]
    body(model_file, imports)
    known = f'NETWORKS = {{"{kind.__name__}": {kind.__name__}}}'
    return module("network", imports, [*bodies, known, inspect.getsource(EDMModel)])


def pipeline_source() -> str:
    """The module with the pipeline of latents."""
    imports: dict[str, None] = {}
    return module("pipeline", imports, [body(pipeline_file, imports) + "\n"])


def module(what: str, imports: dict[str, None], bodies: list[str]) -> str:
    """One module of these imports and bodies."""
    first = [line for line in imports if line.startswith("from __future__")]
    rest = [line for line in imports if line not in first]
    return "\n\n".join([HEADER.format(what=what) + "\n".join(first), "\n".join(rest), *bodies])
