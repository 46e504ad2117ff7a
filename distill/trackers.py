"""Trackers: metrics.jsonl always, and those of a recipe through Accelerate."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from teachers.errors import UserError


class JSONL(GeneralTracker):
    """A line of JSON for each log: {"step": n, name: value, ...}."""

    name = "jsonl"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Do nothing: the configuration is in recipe.yaml."""

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def trackers(names: tuple[str, ...], out: Path) -> list[Any]:
    """Accelerate's `log_with` for a run in `out`.

    Raises:
        UserError: a tracker's package is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"train.trackers: {name} is not installed; pip install 'fewstep[train-logs]'"
            )
    return [JSONL(out / "metrics.jsonl"), *names]
