"""How many training steps, of what batch, some hours buy: first steps, then samples for each."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from teachers.errors import UserError

SMALLEST = 64  # samples of an update, below which no recipe's batch is cut
LARGEST = 128  # to which the batch of a recipe that was never run may grow: DMD2's on SDXL
FEWEST = 50  # training steps that are worth a run
KEPT = 0.1  # share of the hours for building, exporting and saving
MEASURED = 0.3  # and for evaluations


@dataclass(frozen=True)
class Budget:
    """What the hours buy.

    Args:
        steps, batch, accumulate: Of training.
        share: Of the recipe's training steps.
        rate: What learning rates are multiplied by.
    """

    steps: int
    batch: int
    accumulate: int
    share: float
    rate: float


def budget_of(train: dict[str, Any], usable: float, sample: float, grows: bool) -> Budget:
    """The steps and the batch of a recipe for `usable` seconds.

    Steps come first, up to the recipe's at the smallest batch; then the batch, up to the recipe's
    or, where it `grows`, 128. So neither becomes smaller with more time. A smaller batch lowers the
    learning rates by the root of its share (Malladi et al., arXiv:2205.10287, for Adam).

    Args:
        train: The recipe's section.
        sample: Seconds of one sample of an update.

    Raises:
        UserError: the time does not buy a run.
    """
    own, most = train.get("batch", 64), train["steps"]
    least = min(own, SMALLEST)
    affordable = usable / sample
    steps = min(most, int(affordable / least))
    if steps < min(FEWEST, most):
        hours = min(FEWEST, most) * least * sample / 3600 / (1 - KEPT - MEASURED)
        raise UserError(
            f"--hours: they buy {steps} training steps of {least} samples; give {hours:.2g} hours "
            "or more, or a faster card"
        )
    top = max(own, LARGEST) if grows else own
    sizes = [least * 2**i for i in range(int(math.log2(top / least)) + 1)] + [own]
    batch = max(b for b in sizes if b * steps <= affordable or b == least)
    at_once = own // train.get("accumulate", 1)
    parts = next(n for n in range(math.ceil(batch / at_once), batch + 1) if batch % n == 0)
    return Budget(steps, batch, parts, steps / most, min(1.0, math.sqrt(batch / own)))


def spent(tree: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """The recipe's keys with the budget's steps: all that is counted in steps shrinks with them."""
    tree = deepcopy(tree)
    train = tree["train"]
    train |= {"steps": budget.steps, "batch": budget.batch, "accumulate": budget.accumulate}

    def shorten(section: dict[str, Any], *keys: str) -> None:
        for key in keys:
            if section.get(key):
                section[key] = max(1, round(section[key] * budget.share))

    shorten(tree["objective"], "stage_steps", "warmup")
    for player in tree.get("players", {}).values():
        shorten(player, "warmup", "decay_steps")
        if budget.rate < 1 and "lr" in player:
            player["lr"] = float(f"{player['lr'] * budget.rate:.3g}")
    shorten(train, "sample_every", "save_every", "log_every")
    return tree
