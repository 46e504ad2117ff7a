"""The file that `distill eval --json` leaves: figures, what they are of, and those of each seed.

A call whose file is there keeps what is in it; a file of anything else is left alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.files import write
from teachers.errors import UserError

PARTS = ("seeds", "against")  # of the subject, and of the teacher beside it


class Figures:
    """Figures on the disk.

    Args:
        of: What they are of, in plain terms: the source, how it draws, the protocol.

    Raises:
        UserError: the file is there and holds something else.
    """

    def __init__(self, path: Path, of: dict[str, Any]) -> None:
        self.path, self.of = path, json.loads(json.dumps(of))
        self.before = self._read()

    def record(self, part: str) -> Path:
        """Where the figures of each seed are while they are measured."""
        return self.path.with_name(f"{self.path.name}.{part}")

    def open(self) -> None:
        """Put what an earlier call kept where this one looks for it."""
        for part, kept in self.before.get("kept", {}).items():
            if part in PARTS and not self.record(part).exists():
                write(self.record(part), json.dumps(kept))

    def close(self, tree: dict[str, Any]) -> None:
        """Write the figures, with those of other step counts that an earlier call left."""
        kept = {
            v: json.loads(p.read_text(encoding="utf-8"))
            for v in PARTS
            if (p := self.record(v)).exists()
        }
        if self._abouts(self.before.get("kept", {})) == self._abouts(kept):  # of the same weights
            for key, new in tree.items():
                if isinstance(new, dict):
                    tree[key] = self.before.get(key, {}) | new
        write(self.path, json.dumps({"of": self.of, **tree, "kept": kept}, indent=2) + "\n")
        for part in PARTS:
            self.record(part).unlink(missing_ok=True)

    def _abouts(self, kept: dict[str, Any]) -> dict[str, Any]:
        return {part: found.get("about") for part, found in kept.items()}

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            of, kept = dict(found["of"]), found.get("kept", {})
            if not all(isinstance(v, dict) for v in (kept, *kept.values())):
                raise TypeError
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"--json {self.path}: it is there, and no figures of distill eval; give another"
            ) from None
        if key := next((k for k in {**of, **self.of} if of.get(k) != self.of.get(k)), None):
            raise UserError(
                f"--json {self.path}: it holds figures of {key} {of.get(key)!r}, not "
                f"{self.of.get(key)!r}; give another"
            )
        return found
