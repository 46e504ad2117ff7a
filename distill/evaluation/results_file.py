"""The JSON file of `distill eval --json`: figures of the means and of each seed, and their source.

A second call with the same source and options adds to the file. A file of anything else is left
alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.files import write
from teachers.errors import UserError

PARTS = ("seeds", "against")  # the records of the subject, and of the teacher beside it


class ResultsFile:
    """Figures in a file.

    Args:
        options: What the figures depend on, in plain data: source, sampler, protocol. The file
            keeps it under `of`.

    Raises:
        UserError: the file exists and holds something else.
    """

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path, self.options = path, json.loads(json.dumps(options))
        self.before = self._read()

    def record(self, part: str) -> Path:
        """The file beside it that keeps each finished seed during a call."""
        return self.path.with_name(f"{self.path.name}.{part}")

    def open(self) -> None:
        """Write the records of an earlier call from this file to their own files."""
        for part, seeds in self.before.get("kept", {}).items():
            if part in PARTS and not self.record(part).exists():
                write(self.record(part), json.dumps(seeds))

    def close(self, tree: dict[str, Any]) -> None:
        """Write the figures together with an earlier call's figures at other step counts."""
        records = {
            part: json.loads(path.read_text(encoding="utf-8"))
            for part in PARTS
            if (path := self.record(part)).exists()
        }
        # the earlier figures count only if they are of the same weights
        if self._identities(self.before.get("kept", {})) == self._identities(records):
            for key, new in tree.items():
                if isinstance(new, dict):
                    tree[key] = self.before.get(key, {}) | new
        tree = {"of": self.options, **tree, "kept": records}
        write(self.path, json.dumps(tree, indent=2) + "\n")
        for part in PARTS:
            self.record(part).unlink(missing_ok=True)

    def _identities(self, records: dict[str, Any]) -> dict[str, Any]:
        return {part: record.get("about") for part, record in records.items()}

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        try:
            tree = json.loads(self.path.read_text(encoding="utf-8"))
            options, records = dict(tree["of"]), tree.get("kept", {})
            if not all(isinstance(v, dict) for v in (records, *records.values())):
                raise TypeError
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f"--json {self.path}: it exists and holds no figures of distill eval; "
                "give another file"
            ) from None
        keys = {**options, **self.options}
        if key := next((k for k in keys if options.get(k) != self.options.get(k)), None):
            raise UserError(
                f"--json {self.path}: it holds figures of {key} {options.get(key)!r}, not "
                f"{self.options.get(key)!r}; give another file"
            )
        return tree
