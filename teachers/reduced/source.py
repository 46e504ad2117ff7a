"""The source of a changed network, beside its weights, for diffusers to import."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from teachers.reduced.haar import HaarUNet2DModel
from teachers.reduced.network import ReducedUNet2DConditionModel, ReducedUNet2DModel

CLASSES = (ReducedUNet2DModel, ReducedUNet2DConditionModel, HaarUNet2DModel)

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
    (own,) = (c for c in CLASSES if isinstance(backbone, c))
    body = inspect.getsource(sys.modules[own.__module__])
    body = body[body.index("from __future__") :]
    (folder / part / f"{module_of(kind)}.py").write_text(HEADER + "\n" + body, encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index[part] = [module_of(kind), kind]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
