"""The choice of a recipe: start, form, budget and evaluations, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distill.auto.budget import KEPT, MEASURED, Budget, budget_of, spent
from distill.auto.evidence import Evidence
from distill.auto.ladder import Fit, PlanOf, ladder_of
from distill.auto.machine import Machine
from distill.auto.start import PROMPTS, Start, header, start_of
from distill.auto.subject import Subject
from distill.benchmark.spec import laid_over
from distill.config.recipe import Recipe
from distill.planning.plan import Plan
from teachers.errors import plural

EVALUATIONS = 12  # in training
WINDOW = 3  # of them, that are compared with as many before: a quarter of the run
TOLERANCE = 0.02
SENTENCE = re.compile(r"(?<=\.) (?=[A-Z])")
COMPILED = 2000  # training steps from which compiling pays on a GPU: decision 11


@dataclass(frozen=True)
class Reason:
    """A choice: the section of the recipe that it is in, what was chosen, and why."""

    section: str
    what: str
    value: str
    why: str


@dataclass
class Choice:
    """A recipe with its reasons.

    Args:
        tree: The recipe's keys.
        unknown: What was not known, one sentence each.
        hours, gb, dollars: Expected.
        figure: What the evidence says of a student by this recipe; empty without evidence.
    """

    tree: dict[str, Any]
    reasons: list[Reason] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    hours: float = 0.0
    gb: float = 0.0
    dollars: float = 0.0
    figure: str = ""

    @property
    def recipe(self) -> Recipe:
        return Recipe.check(self.tree)


def choose(
    subject: Subject,
    machine: Machine,
    hours: float,
    steps: int | None,
    data: Mapping[str, Any],
    plan_of: PlanOf,
) -> Choice:
    """The recipe for a model, a machine and some hours.

    Args:
        steps: Of sampling; None leaves the choice to the evidence.
        data: The recipe's section, from the user's own data; empty without any.
        plan_of: Makes the plan of a recipe.

    Raises:
        UserError: no form fits in memory, or the hours buy no run.
    """
    start = start_of(subject, steps, data)
    fit = ladder_of(start.tree, subject, machine.gpu, plan_of).fitting(machine)
    tree = fit.form.tree
    measures = "protocol" in tree.get("eval", {})
    usable = 3600 * hours * (1 - KEPT - MEASURED * measures)
    per_sample = machine.seconds(fit.plan) / fit.plan.batch
    budget = budget_of(tree["train"], usable, per_sample, grows=start.unrun)
    most = whole(float(f"{hours * (1 - KEPT):.4g}"))  # never 0, however few
    tree = laid_over(spent(tree, budget), {"train": {"hours": most}})
    if measures:
        every = max(1, budget.steps // EVALUATIONS)
        section = {"every": every, "stop_when_flat": {"window": WINDOW, "tolerance": TOLERANCE}}
        tree = laid_over(tree, {"eval": section})
    if machine.gpu:
        mode = "blocks" if budget.steps >= COMPILED else "off"
        tree = laid_over(tree, {"train": {"compile": mode}})
    train_hours = per_sample * budget.batch * budget.steps / 3600
    expected = train_hours / (1 - KEPT - MEASURED * measures)
    choice = Choice(tree, hours=expected, gb=fit.need, dollars=expected * machine.price)
    if start.evidence is not None and budget.share == 1 and "adapters" not in tree["teacher"]:
        choice.figure = start.evidence.text()
    choice.reasons = reasons(subject, machine, start, fit, budget, choice, steps, hours)
    choice.unknown = unknowns(subject, machine, start, fit, budget, choice)
    return choice


def reasons(
    subject: Subject,
    machine: Machine,
    start: Start,
    fit: Fit,
    budget: Budget,
    choice: Choice,
    steps: int | None,
    hours: float,
) -> list[Reason]:
    """One line for each choice, in the order of a recipe."""
    tree, own = choice.tree, start.tree
    count, train = tree.get("student", {}).get("steps", 1), tree["train"]
    if steps is not None:
        why_steps = "as asked"
    elif start.relation == "measured":
        why_steps = "the evidence's"
        if start.ties:
            why_steps = f"the fewest of {start.ties + 1} rows within the best one's spread"
    else:
        why_steps = f"{start.name}'s"
    found = [
        Reason("teacher", "start from", start.name, why_start(subject, start)),
        Reason("objective", "objective", tree["objective"]["name"], why_objective(start)),
        Reason("student", "sampling steps", str(count), why_steps),
        Reason("adapters" if "adapters" in tree else "train", "form", *why_form(machine, fit)),
        Reason("players", "learning rates", *why_rates(tree, start, budget)),
        Reason(
            "train",
            "training steps",
            f"{budget.steps:,}",
            why_length(own, budget, hours, step_text(machine, fit.plan, budget)),
        ),
        Reason("train", "batch", batch_text(budget), why_batch(own, budget, start)),
        Reason("train", "precision", train.get("precision", "fp32"), f"{start.name}'s"),
    ]
    if "compile" in train:
        why = f"{budget.steps:,} training steps; it pays from {COMPILED:,} (decision 11)"
        found.append(Reason("train", "compile", train["compile"], why))
    if "eval" in tree:
        section = tree["eval"]
        value = f"every {section['every']} steps"
        why = (
            f"{EVALUATIONS} in all; training ends early when the median of {WINDOW} is not "
            f"{100 * TOLERANCE:g} % better than that of the {WINDOW} before"
        )
        found.append(Reason("eval", "evaluation", value, why))
    return found


def why_start(subject: Subject, start: Start) -> str:
    if start.relation == "measured":
        return f"measured on {subject.source} itself"
    if start.relation == "family":
        return f"the recipe of this family ({subject.family}), with its papers' settings"
    if subject.small:
        millions, count = subject.parameters / 1e6, f"{subject.parameters:,} parameters"
        size = f"{millions:.3g} million parameters" if millions >= 0.1 else count
        return f"of {size}, as the embedded teachers, whose best student this is"
    return f"no recipe of the family {subject.family!r}; the nearest by its prompts and process"


def why_objective(start: Start) -> str:
    if (row := start.evidence) is not None:
        place = row.source.removeprefix("docs/results/")
        text, top = f"{row_text(row)} ({place})", start.top
        if top is None or top == row:
            return f"{text}, the best measured"
        return f"{text}, within the spread of the best, {top.objective}: {row_text(top)}"
    text = f"{start.name}'s"
    if (near := start.near) is not None and near.recipe == start.name:
        text += f", which has {row_text(near)} on {near.model}"
    elif near is not None:
        text += f"; the best on {near.model} is {near.objective}: {row_text(near)}"
    return text


def row_text(row: Evidence) -> str:
    return f"{row.text()} in {row.steps} {plural(row.steps, 'step')}"


def why_form(machine: Machine, fit: Fit) -> tuple[str, str]:
    name = fit.form.name
    why = f"{fit.need:.1f} of {machine.memory:.3g} GB (distill plan)"
    if fit.larger is not None:
        larger, gb = fit.larger
        why += f"; {larger.partition(',')[0]} takes at least {gb:.1f} GB"
    return name, why


def why_rates(tree: dict[str, Any], start: Start, budget: Budget) -> tuple[str, str]:
    rates = {k: v["lr"] for k, v in tree.get("players", {}).items() if "lr" in v}
    value = ", ".join(f"{k} {rate_text(v)}" for k, v in rates.items()) or "1e-4"
    if "adapters" in tree and "adapters" not in start.tree:
        why = "those of the LoRA recipes, sdxl/dmd2-lora and others"
    else:
        why = f"{start.name}'s"
    if budget.rate < 1:
        why += f", times {budget.rate:.2g}, the root of the batch's share (arXiv:2205.10287)"
    return value, why


def rate_text(rate: float) -> str:
    """Such as 5e-4."""
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def step_text(machine: Machine, plan: Plan, budget: Budget) -> str:
    """Such as "8.1 s each, at 40% of the card's rate, assumed"."""
    seconds = machine.seconds(plan) / plan.batch * budget.batch
    each = f"{seconds:.2g} s" if seconds >= 0.1 else f"{1000 * seconds:.2g} ms"
    return f"{each} each, {machine.speed_text(plan)}"


def why_length(own: dict[str, Any], budget: Budget, hours: float, each: str) -> str:
    steps = own["train"]["steps"]
    if budget.share == 1:
        why = f"all of the recipe's: {each}"
    else:
        why = f"what {hours_text(hours)} can buy of the recipe's {steps:,}: {each}"
    return f"{why}; training ends after {(1 - KEPT) * hours:.3g} h at the latest"


def whole(value: float) -> float | int:
    """A number as a recipe has it: 8, not 8.0."""
    return int(value) if value == int(value) else value


def hours_text(hours: float) -> str:
    return f"{hours:g} {'hour' if hours == 1 else 'hours'}"


def batch_text(budget: Budget) -> str:
    if budget.accumulate == 1:
        return str(budget.batch)
    return f"{budget.batch} in {budget.accumulate} parts"


def why_batch(own: dict[str, Any], budget: Budget, start: Start) -> str:
    before = own["train"].get("batch", 64)
    if budget.batch == before:
        return f"{start.name}'s"
    if budget.batch < before:
        return f"the recipe's {before:,} leaves too few training steps"
    return f"the hours allow more than the recipe's {before}; DMD2's on SDXL is 128"


def expectation(name: str) -> str:
    """What a recipe's header expects of it; empty where it says nothing."""
    text = " ".join(line.lstrip("# ") for line in header(name).splitlines())
    found = [s for s in SENTENCE.split(text) if "we expect" in s.lower()]
    return " ".join(["Its header says:", *found]) if found else ""


def unknowns(
    subject: Subject, machine: Machine, start: Start, fit: Fit, budget: Budget, choice: Choice
) -> list[str]:
    """What was not known."""
    found = []
    if start.relation != "measured":
        found.append("No bench measured this model.")
    if start.unrun:
        found.append(f"The recipe was never run at full scale. {expectation(start.name)}".strip())
    if not subject.weights:
        found.append("The weights are not here: the doctor checked nothing.")
    if not machine.rate and not fit.plan.share(machine.name).source:
        found.append(f"No training was measured on {machine.name}: its speed is assumed.")
    if subject.small and not machine.rate:
        found.append("Starting kernels takes longer than so small a network computes.")
    if budget.share < 1:
        found.append(f"No student of {budget.share:.0%} of the recipe's training was measured.")
    if "eval" not in choice.tree:
        found.append("Nothing measures it in training: it cannot end early. Watch its samples.")
    if choice.tree.get("data") == PROMPTS:
        found.append("The prompts are general ones (pack:starter), not yours: see --data.")
    if subject.adapters and "captions" not in choice.tree.get("data", {}):
        found.append("No caption has the words of your LoRA: give 20 to 200 of them by --data.")
    return found
