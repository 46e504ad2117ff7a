"""Train small runs in one or two processes and leave their final weights: see test_ranks.py."""

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

from distill.__main__ import destroy_process_group, exit_now
from distill.config.recipe import Recipe
from distill.training import build
from tests.helpers.toys import FIVE, recipe_tree


def main(teacher: str, folder: Path) -> None:
    torch.set_num_threads(1)
    for name in FIVE:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        tree = recipe_tree(name, teacher, steps=20, batch=16, log_every=10, save_every=20)
        if name == "progressive":
            tree["objective"]["stage_steps"] = 7
        engine = build.build(Recipe.check(tree), folder / name).engine
        engine.train()
        rank = engine.accelerator.process_index
        state = {
            f"{player}.{i}": p.detach().clone()
            for player, q in engine.players.items()
            for i, p in enumerate(q.params)
        }
        save_file(state, folder / f"{name}-{rank}.safetensors")
    destroy_process_group()
    exit_now(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
