"""Distil pretrained diffusion and flow models into one- to four-step generators."""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

# Our package names are plain words. A user's own eval.py beside their script would be imported in
# place of ours, and fail far from the cause; so say it here, in one line.
for _name in ("teachers", "students", "eval"):
    _spec = find_spec(_name)
    _found = _spec and _spec.origin and Path(_spec.origin)
    if not _found or _found.parent.parent != Path(__file__).parent.parent:
        raise ImportError(
            f"fewstep needs its own package {_name!r}, but {_found or 'nothing'} is found first; "
            f"rename that file, or run from another folder"
        )
