"""The source of a changed network, beside its weights, for diffusers to import."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from teachers.reduced import (
    experts,
    feedback,
    haar,
    layers,
    network,
    one_pass,
    pyramid,
    repeated,
)
from teachers.reduced.feedback import FeedbackUNet2DConditionModel
from teachers.reduced.haar import HaarUNet2DModel
from teachers.reduced.network import ReducedUNet2DConditionModel, ReducedUNet2DModel
from teachers.reduced.one_pass import OnePassUNet2DConditionModel

CHANGED = (repeated, pyramid, experts, layers, network)  # one that another one needs comes first
MODULES = {  # that each class is made of
    ReducedUNet2DModel: CHANGED,
    ReducedUNet2DConditionModel: CHANGED,
    HaarUNet2DModel: (haar,),
    OnePassUNet2DConditionModel: (*CHANGED, one_pass),
    FeedbackUNet2DConditionModel: (*CHANGED, one_pass, feedback),
}
CLASSES = tuple(MODULES)

HEADER = '''"""The network of this pipeline: one of diffusers, changed; Apache-2.0.

Load the whole folder: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).
"""
'''


def module_of(kind: str) -> str:
    """The module of a class: a name for each, since diffusers gives those of one name one
    namespace."""
    return kind.lower()


def write(folder: Path, part: str, backbone: Any) -> None:
    """Make the pipeline saved in `folder` one that loads without our packages.

    Args:
        part: The pipeline's component that is the network.
    """
    kind = type(backbone).__name__
    modules = next(v for k, v in reversed(MODULES.items()) if isinstance(backbone, k))
    (folder / part / f"{module_of(kind)}.py").write_text(source(*modules), encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index[part] = [module_of(kind), kind]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def source(*modules: ModuleType) -> str:
    """One module of several, which needs none of our packages: diffusers fetches no second file."""
    imports: dict[str, None] = {}  # a set that keeps their order
    bodies = [body(module, imports) for module in modules]
    first = [line for line in imports if line.startswith("from __future__")]
    rest = [line for line in imports if line not in first]
    return "\n\n".join([HEADER, "\n".join([*first, "", *rest]), *bodies]) + "\n"


def body(module: ModuleType, imports: dict[str, None]) -> str:
    """A module's source without its docstring and imports; these are added, but for our own."""
    text = inspect.getsource(module)
    lines, cut = text.splitlines(), set()
    for i, node in enumerate(ast.parse(text).body):
        own = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("teachers")
        imported = isinstance(node, ast.Import | ast.ImportFrom)
        if imported and not own:
            imports[ast.unparse(node)] = None
        if imported or i == 0:
            assert node.end_lineno is not None
            cut |= set(range(node.lineno - 1, node.end_lineno))
    return "\n".join(line for i, line in enumerate(lines) if i not in cut).strip()
