"""Train small runs in one or two processes and leave their final weights: see test_ranks.py."""

import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

from distill.__main__ import destroy_process_group, exit_now
from distill.config.recipe import Recipe
from distill.training import build
from tests.helpers import ranks_stopped
from tests.helpers.toys import FIVE, recipe_tree


def guarded(teacher: str, folder: Path) -> None:
    """A run whose guards have planted scores, which only the first process may ask for."""
    AcceleratorState._reset_state()
    tree = recipe_tree("dmd2", teacher, steps=6, batch=16, guards={"every": 1})
    engine = build.build(Recipe.check(tree), folder / "guarded").engine
    rank, planted = engine.accelerator.process_index, [0.9, 1.0, 0.5]

    def measure() -> dict[str, float]:
        assert rank == 0
        return {"diversity": planted[engine.step - 1]}

    assert engine.guards is not None
    engine.guards.measure = measure
    engine.train()
    state = {str(i): v.clone() for i, v in enumerate(engine.ema.mean)}
    about = torch.tensor([engine.step, engine.guards.step])
    save_file({**state, "steps": about}, folder / f"guarded-{rank}.safetensors")


def main(teacher: str, folder: Path) -> None:
    torch.set_num_threads(1)
    for name in FIVE:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        tree = recipe_tree(name, teacher, steps=10, batch=16, log_every=5, save_every=10)
        if name == "progressive":
            tree["objective"]["stage_steps"] = 4
        engine = build.build(Recipe.check(tree), folder / name).engine
        engine.train()
        rank = engine.accelerator.process_index
        state = {
            f"{player}.{i}": p.detach().clone()
            for player, q in engine.players.items()
            for i, p in enumerate(q.params)
        }
        save_file(state, folder / f"{name}-{rank}.safetensors")
    guarded(teacher, folder)
    if os.environ.get("WORLD_SIZE") == "2":
        ranks_stopped.main(teacher, folder / "stopped")
    destroy_process_group()
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
