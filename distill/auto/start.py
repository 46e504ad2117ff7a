"""Where a recipe starts from: this model's evidence, a recipe of its family, or the nearest."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.auto.evidence import Evidence, best, of_kind, of_model
from distill.auto.subject import Subject
from distill.benchmark.spec import laid_over
from distill.config.recipe import SHIPPED, Recipe, find, read_yaml, shipped
from teachers.errors import UserError

UNRUN = "Not yet run at full scale"  # in the header of a recipe
LIKE = {"text": "sdxl/dmd2-lora", "flow": "sd3/dmd2-lora", "labels": "sit/dmd2"}  # of no family
PROMPTS = {"prompts": "pack:starter"}
# Of objectives that the benches do not tell apart, those with published students of several groups
# at the size of real models come first.
PUBLISHED = ("dmd2", "sid", "lcm", "consistency")


@dataclass(frozen=True)
class Start:
    """The recipe to begin from, for the model at hand.

    Args:
        name: The shipped recipe, or the bench's row.
        tree: Its keys, with this model as the teacher.
        relation: Why this recipe: "measured" on this model, of its "family", or only "like" it.
        evidence: What was measured on this model.
        near: The best row of the bench whose prompts are of the same kind.
        top: Of this model's rows, the one with the best figure.
        ties: How many other rows are within its spread.
    """

    name: str
    tree: dict[str, Any]
    relation: str
    evidence: Evidence | None = None
    near: Evidence | None = None
    top: Evidence | None = None
    ties: int = 0

    @property
    def unrun(self) -> bool:
        """Whether its header says that it was not yet run."""
        return self.relation != "measured" and UNRUN in header(self.name)

    @property
    def samples(self) -> int:
        """That its student is trained on."""
        return self.tree["train"]["steps"] * self.tree["train"].get("batch", 64)


def header(name: str) -> str:
    """The comments at the top of a shipped recipe."""
    path = find(name)
    return "\n".join(v for v in path.read_text(encoding="utf-8").splitlines() if v.startswith("#"))


def start_of(subject: Subject, steps: int | None, data: Mapping[str, Any]) -> Start:
    """The recipe to begin from.

    Args:
        steps: Of sampling; None leaves the choice to the evidence.
        data: The recipe's section, from the user's own data; empty without any.

    Raises:
        UserError: every recipe of the family needs data, and there are none.
    """
    rows, embedded = of_model(subject.source), not data
    if not rows and subject.small:
        rows, embedded = of_model(of_kind(subject.kind)), False
    if rows := [row for row in rows if is_usable(row, subject, embedded or "source" in data)]:
        return measured(subject, rows, steps, data)
    names = family(subject)
    trees = {name: adapted(read_yaml(find(name)), subject, data, True) for name in names}
    relation = "family"
    if not trees:
        kind = "flow" if subject.kind == "text" and subject.flows else subject.kind
        name, relation = LIKE.get(kind, LIKE["labels"]), "like"
        trees = {name: adapted(read_yaml(find(name)), subject, data, False)}
    usable = {k: tree for k, tree in trees.items() if has_data(tree)}
    if not usable:
        raise UserError(
            f"--data: every recipe for this model learns from data ({', '.join(trees)}); give a "
            "folder of images like those it was trained on"
        )
    near = nearest(subject.kind, steps)
    good = {near.objective} if near else set()

    def order(name: str) -> tuple[bool, bool, int, int, int]:
        tree = usable[name]
        own, objective = sources(name) == subject.source, tree["objective"]["name"]
        known = PUBLISHED.index(objective) if objective in PUBLISHED else len(PUBLISHED)
        options = len(tree["objective"])  # the plain form of an objective before its variants
        return not own, objective not in good, known, options, samples(tree)

    name = min(usable, key=order)
    tree = with_steps(usable[name], steps)
    return Start(name, tree, relation, near=near)


def measured(
    subject: Subject, rows: list[Evidence], steps: int | None, data: Mapping[str, Any]
) -> Start:
    """The best row of a model's evidence, or of that of the embedded model like it."""
    if subject.adapters:
        rows = [row for row in rows if "adapters" in tree_of(row)] or rows
    at = None
    if steps is not None:
        at = min({row.steps for row in rows}, key=lambda k: (abs(k - steps), k))
    ranked = best(row for row in rows if at in (None, row.steps))
    row, top = ranked[0], min(ranked, key=lambda v: v.loss(v.ranked_by))
    own = row.model == subject.source
    tree = adapted(tree_of(row), subject, data, own)
    tree = with_steps(tree, row.steps if steps is None else steps)
    relation = "measured" if own and steps in (None, row.steps) else "like"
    evidence = row if relation == "measured" else None
    return Start(row.recipe or row.name, tree, relation, evidence, row, top, len(ranked) - 1)


def tree_of(row: Evidence) -> dict[str, Any]:
    """The keys of a row's recipe, with its training steps."""
    tree = {} if row.recipe is None else read_yaml(find(row.recipe))
    tree = laid_over(deepcopy(tree), deepcopy(dict(row.changes)))
    tree = {k: v for k, v in tree.items() if v is not None}
    return laid_over(tree, {"train": {"steps": row.trained}})


def is_usable(row: Evidence, subject: Subject, has_data: bool) -> bool:
    """Whether this model can be trained as a row was, with the data at hand."""
    critic = subject.takes_critic or "critic" not in tree_of(row)
    return critic and (has_data or not needs_data(row))


def needs_data(row: Evidence) -> bool:
    """Whether a row's recipe learns from real data."""
    return Recipe.check(tree_of(row)).needs_data


def family(subject: Subject) -> list[str]:
    """The shipped recipes of a model's source or else of its family, which train students of few
    steps and of the teacher's network."""
    names = [name for name in shipped() if name.partition("/")[0] not in ("bench", "teachers")]
    names = [n for n in names if "architecture" not in read_yaml(find(n)).get("student", {})]
    own = [name for name in names if sources(name) == subject.source]
    folder = subject.family
    return own or [name for name in names if name.partition("/")[0] == folder]


def sources(name: str) -> str:
    """The teacher of a shipped recipe."""
    teacher = read_yaml(SHIPPED / f"{name}.yaml").get("teacher", "")
    return teacher if isinstance(teacher, str) else str(teacher.get("source", ""))


def adapted(
    tree: dict[str, Any], subject: Subject, data: Mapping[str, Any], same_family: bool
) -> dict[str, Any]:
    """A recipe's keys for this model: its teacher, and data that it can read."""
    tree = deepcopy(tree)
    teacher = tree["teacher"]
    before: dict[str, Any] = teacher if isinstance(teacher, dict) else {"source": teacher}
    own = before.get("source") == subject.source
    kept = {k: v for k, v in before.items() if k != "adapters"} if same_family else {}
    if not same_family:
        kept = settings_of_another(before, subject)
        tree.get("adapters", {}).pop("targets", None)
        if not subject.chooses_start:
            tree.get("student", {}).pop("start", None)
    tree["teacher"] = {**kept, "source": subject.source}
    if subject.adapters:
        tree["teacher"]["adapters"] = [dict(v) for v in subject.adapters]
        tree.setdefault("adapters", {"rank": 64})
    if not own:
        tree.pop("eval", None)
    tree["data"] = data_of(tree, subject, data, own)
    return {k: v for k, v in tree.items() if v or k != "data"}


def settings_of_another(teacher: Mapping[str, Any], subject: Subject) -> dict[str, Any]:
    """The teacher's section from a recipe of another family: guidance and precision."""
    guidance = teacher.get("guidance", 1)
    scale = guidance["scale"] if isinstance(guidance, dict) else guidance
    if isinstance(scale, list | tuple):  # a range
        scale = guidance.get("sampling_scale") or sum(scale) / 2
    kept = {"guidance": 1 if subject.unguided else scale}
    quantisable = not subject.small and subject.quantisable
    return {**kept, **({"precision": "bf16"} if quantisable else {})}


def data_of(
    tree: dict[str, Any], subject: Subject, data: Mapping[str, Any], own: bool
) -> dict[str, Any]:
    """The recipe's section of data: the user's, or prompts of a pack where the model reads text."""
    if data:
        return dict(data)
    before = tree.get("data", {})
    if own and before.get("source") in ("digits", "shapes"):
        return before
    return dict(PROMPTS) if subject.kind == "text" else {}


def has_data(tree: dict[str, Any]) -> bool:
    """Whether a recipe has the real data that its objective learns from, if it does."""
    if "source" in tree.get("data", {}):
        return True
    whole = laid_over(tree, {"data": {"source": "digits", "prompts": None}})
    return not Recipe.check(whole).needs_data


def samples(tree: dict[str, Any]) -> int:
    """That a recipe's student is trained on."""
    return tree["train"]["steps"] * tree["train"].get("batch", 64)


def with_steps(tree: dict[str, Any], steps: int | None) -> dict[str, Any]:
    """The keys with this number of steps of sampling."""
    return tree if steps is None else laid_over(tree, {"student": {"steps": steps}})


def nearest(kind: str, steps: int | None) -> Evidence | None:
    """The best row of the bench of the same kind, at these steps where it has them."""
    model = of_kind(kind)
    rows = of_model(model, steps) or of_model(model)
    return next(iter(best(rows)), None)


def names_data(path: str, adapters: bool) -> dict[str, Any]:
    """The recipe's section of data for what --data names.

    Args:
        adapters: Whether LoRA files are given: a few captions are then expanded into prompts.

    Raises:
        UserError: there is nothing at the path.
    """
    place = Path(path).expanduser()
    if not place.exists():
        if path in ("digits", "shapes") or ":" in path:
            return {"prompts": path} if path.startswith("pack:") else {"source": path}
        raise UserError(f"--data {path}: no such file or folder; give images, or a file of prompts")
    if place.is_dir():
        texts_alone = {p.suffix for p in place.iterdir() if p.is_file()} == {".txt"}
        return {"captions": path} if texts_alone else {"source": path}
    if place.suffix != ".txt":
        return {"source": path}
    with place.open(encoding="utf-8", errors="replace") as file:
        count = sum(1 for line in file if line.strip())
    return {"captions": path} if adapters and 20 <= count <= 200 else {"prompts": path}
