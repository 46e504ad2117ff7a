"""The forms that a run can have, the largest first, and the largest one that fits in memory.

A form is a recipe with a few keys changed. Its memory is that of `distill plan`. Forms whose
weights alone are too large are not planned, since a plan takes up to a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distill.auto.machine import Machine
from distill.auto.subject import Subject
from distill.benchmark.spec import laid_over
from distill.config.recipe import Recipe
from distill.planning.plan import GB, RESERVE, Plan
from teachers.errors import UserError

PlanOf = Callable[[Recipe], Plan]
BYTES = {None: 4.0, "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "nf4": 0.53}  # of a weight
ROOM = 3  # times a form's memory that must be there before a faster one is planned
LORA_RATES = {
    "student": 5e-5,
    "fake": 1e-4,
    "critic": 1e-4,
}  # of the LoRA recipes of large models


@dataclass(frozen=True)
class Form:
    """A form of a run.

    Args:
        name: As it is shown.
        tree: The recipe's keys.
        least: GB that its weights take alone.
        faster: Whether it only saves time over the form after it.
    """

    name: str
    tree: dict[str, Any]
    least: float
    faster: bool = False


@dataclass
class Fit:
    """The form that was chosen, and what is known of the others.

    Args:
        need: GB of the form, with what CUDA or torch takes itself.
        larger: The next larger form and its GB, which do not fit; None where there is none.
    """

    form: Form
    plan: Plan
    need: float
    larger: tuple[str, float] | None = None


@dataclass
class Ladder:
    """Forms from the largest to the smallest; `own` is the recipe's."""

    forms: list[Form]
    own: int
    plan_of: PlanOf
    plans: dict[int, Plan | None] = field(default_factory=dict)

    def plan(self, i: int) -> Plan | None:
        """The plan of a form; None where the model cannot have it."""
        if i not in self.plans:
            try:
                self.plans[i] = self.plan_of(Recipe.check(self.forms[i].tree))
            except UserError:
                if i == self.own:
                    raise
                self.plans[i] = None
        return self.plans[i]

    def need(self, i: int, memory: float) -> float:
        """GB of a form: planned, or what its weights take where these alone are too large."""
        if (least := self.forms[i].least + RESERVE) > memory:
            return least
        plan = self.plan(i)
        return float("inf") if plan is None else plan.most + RESERVE

    def fitting(self, machine: Machine) -> Fit:
        """The largest form that fits.

        Raises:
            UserError: none fits.
        """
        memory, i = machine.memory, self.own
        if self.need(i, memory) <= memory:
            while i and self.worth_trying(i - 1, memory) and self.need(i - 1, memory) <= memory:
                i -= 1
        else:
            while self.need(i, memory) > memory:
                i += 1
                if i == len(self.forms):
                    raise self.refusal(machine)
        plan = self.plan(i)
        assert plan is not None
        larger = None
        if i and (above := self.forms[i - 1]) and (i > self.own or not above.faster):
            gb = self.plans[i - 1].most + RESERVE if self.plans.get(i - 1) else above.least  # pyright: ignore
            larger = (above.name, gb)
        return Fit(self.forms[i], plan, plan.most + RESERVE, larger)

    def worth_trying(self, i: int, memory: float) -> bool:
        """Whether a form larger than the recipe's own may fit."""
        if self.forms[i].least + RESERVE > memory:
            return False
        return not self.forms[i].faster or ROOM * self.need(self.own, memory) <= memory

    def refusal(self, machine: Machine) -> UserError:
        """What the smallest form needs."""
        i = len(self.forms) - 1
        while i and self.plan(i) is None:
            i -= 1
        plan = self.plan(i)
        assert plan is not None
        return UserError(
            f"--gpu: the smallest form of this run, {self.forms[i].name}, needs "
            f"{plan.most + RESERVE:.1f} GB, and {machine.name} has {machine.memory:.3g}; give a "
            "larger card"
        )


def ladder_of(tree: dict[str, Any], subject: Subject, gpu: bool, plan_of: PlanOf) -> Ladder:
    """All forms of a recipe."""
    larger: list[dict[str, Any]] = []  # the nearest first
    adapters, precision = "adapters" in tree, tree["teacher"].get("precision")
    own = tree
    faster = {"train": {"checkpointing": False}}
    checkpointed = tree["train"].get("checkpointing", False)
    if adapters and precision == "nf4" and gpu:
        larger.append({"teacher": {"precision": "bf16"}})
    if checkpointed:
        larger.append(faster)
    above, trees = own, []
    for change in larger:
        above = laid_over(above, change)
        trees.insert(0, above)
    place = len(trees)
    trees.append(own)
    for change in smaller_changes(tree, subject, gpu):
        trees.append(laid_over(trees[-1], change))
    forms = [
        Form(name_of(v), v, least(v, subject), faster=i < place and not v["train"]["checkpointing"])
        for i, v in enumerate(trees)
    ]
    return Ladder(forms, place, plan_of)


def smaller_changes(tree: dict[str, Any], subject: Subject, gpu: bool) -> list[dict[str, Any]]:
    """Changes that save memory one after another, those that cost least first."""
    train, adapters = tree["train"], "adapters" in tree
    changes: list[dict[str, Any]] = []
    if not train.get("checkpointing", False):
        changes.append({"train": {"checkpointing": True}})
    if train.get("batch", 64) > train.get("accumulate", 1):
        changes.append({"train": {"accumulate": train.get("batch", 64)}})
    players = tree.get("players", {})
    if not adapters and any("offloaded" not in v.get("optimizer", "") for v in players.values()):
        offloaded = {k: {"optimizer": "adamw-offloaded"} for k in players}
        changes.append({"players": offloaded})
    if not adapters:
        rates = {k: {"lr": LORA_RATES[k], "optimizer": "adamw"} for k in players if k in LORA_RATES}
        changes.append({"adapters": {"rank": 64}, **({"players": rates} if rates else {})})
    quantisable = gpu and subject.quantisable
    if quantisable and tree["teacher"].get("precision") != "nf4":
        changes.append({"teacher": {"precision": "nf4"}})
    if adapters and tree["adapters"].get("rank", 64) <= 16:
        return changes
    return [*changes, {"adapters": {"rank": 16}}]


def least(tree: dict[str, Any], subject: Subject) -> float:
    """GB that the frozen weights and, without adapters, the trained copies take alone."""
    frozen = BYTES[tree["teacher"].get("precision")]
    copies = 0 if "adapters" in tree else 2 if "fake" in tree.get("players", {}) else 1
    return subject.parameters * (frozen + 4 * copies) / GB


def name_of(tree: dict[str, Any]) -> str:
    """Such as "LoRA of rank 64 on nf4 weights, activations recomputed, 1 sample at a time"."""
    adapters, train = tree.get("adapters"), tree["train"]
    precision = tree["teacher"].get("precision")
    if adapters is None:
        moments = {v.get("optimizer", "adamw") for v in tree.get("players", {}).values()}
        text = "all weights" + (", moments on the host" if "adamw-offloaded" in moments else "")
    else:
        kind = adapters.get("kind", "lora")
        kind = {"lora": "LoRA", "dora": "DoRA"}.get(kind, kind)
        text = f"{kind} of rank {adapters.get('rank', 64)}"
        text += f" on {precision} weights" if precision else ""
    if train.get("checkpointing", False):
        text += ", activations recomputed"
    at_once = train.get("batch", 64) // train.get("accumulate", 1)
    return f"{text}, {at_once} {'sample' if at_once == 1 else 'samples'} at a time"
