"""The source of a reduced network, beside its weights, for diffusers to import."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from teachers.reduced import network

HEADER = '''"""The network of this pipeline: one of diffusers that does less work; Apache-2.0.

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
    body = inspect.getsource(network)
    body = body[body.index("from __future__") :]
    (folder / part / f"{module_of(kind)}.py").write_text(HEADER + "\n" + body, encoding="utf-8")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index[part] = [module_of(kind), kind]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
