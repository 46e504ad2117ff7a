"""Two processes of which one alone knows why to stop: see test_ranks.py.

It is sent SIGTERM in the midst of a step, measures flat evaluations, or has trained for too long.
"""

import json
import signal
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState

from distill.config.recipe import Recipe
from distill.config.schema import FlatSection
from distill.training import build
from distill.training.engine import Stopped
from tests.helpers.toys import recipe_tree

STEPS = 8


def end_early(teacher: str, folder: Path) -> None:
    """Train until the first process's evaluations are flat, or until its hours are over."""
    for why in ("flat", "hours"):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        tree = recipe_tree("consistency", teacher, steps=STEPS, log_every=2, save_every=STEPS)
        tree["train"]["hours"] = 1.0
        engine: Any = build.build(Recipe.check(tree), folder / why).engine
        rank = engine.accelerator.process_index
        if why == "flat":
            engine.evaluate_every, engine.stop_when_flat = 1, FlatSection(window=2)
            engine.evaluate = lambda steps: {"headline": "fd", "fd": 1.0}
        elif rank == 0:
            engine.seconds = 3600.0 - 1e-6
        engine.train()
        report = {"ended": engine.ended, "step": engine.step, "curve": engine.curve}
        (folder / f"{why}-{rank}.json").write_text(json.dumps(report))


def main(teacher: str, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    end_early(teacher, folder)
    for when in (3, STEPS):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        tree = recipe_tree("consistency", teacher, steps=STEPS, log_every=STEPS, save_every=STEPS)
        engine: Any = build.build(Recipe.check(tree), folder / str(when)).engine
        play, rank = engine.play, engine.accelerator.process_index

        def signalled(*args, engine=engine, play=play, rank=rank, when=when):
            if rank == 1 and engine.step + 1 == when:
                signal.raise_signal(signal.SIGTERM)
            return play(*args)

        engine.play = signalled
        found = None
        try:
            engine.train()
        except Stopped as stopped:
            found = str(stopped)
        report = {"signal": found, "step": engine.step}
        (folder / f"{when}-{rank}.json").write_text(json.dumps(report))
