"""What is the same for every part of a teacher that `distill teach` trains: the run around it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.config.recipe import Recipe
from distill.evaluation.finish import summarise
from distill.files import write
from distill.training import build
from distill.training.run_folder import release


def teach_part(
    recipe: Recipe, out: Path, resume: bool, finish: Callable[[build.Run], dict[str, Any]]
) -> dict[str, Any]:
    """Train a part; then save and measure it, with the average of its weights in place.

    Args:
        finish: Saves and measures the part of a trained run, in the main process alone. It returns
            the run's figures as `metrics`, and what else summary.json has.

    Returns:
        The content of summary.json; nothing in other processes than the main one.

    Raises:
        UserError: as `build.build`.
    """
    run = build.build(recipe, out, resume)
    run.engine.train()
    summary: dict[str, Any] = {}
    if run.engine.accelerator.is_main_process:
        with run.engine.ema.swapped():
            found = finish(run)
        summary = {**summarise(run, found.pop("metrics")), **found}
        write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    run.engine.accelerator.wait_for_everyone()
    run.engine.accelerator.end_training()
    release(out)
    return summary


@contextmanager
def draft_of(folder: Path) -> Iterator[Path]:
    """The path of a hidden folder beside this one, which takes its place once the block has ended.

    There is none yet, and what an earlier run left there is gone.
    """
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    yield draft
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
