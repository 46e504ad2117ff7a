"""The recipes of a tuning: the teacher's LoRA on the pictures, and the student's run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from distill.config.optimizer import OptimizerConfig
from distill.config.recipe import Recipe, override
from distill.tuning.pictures import OWN_PROMPTS
from distill.tuning.student import Tunable
from students.export.lora_files import DIFFUSERS, TURBO
from teachers.errors import UserError, nearest

# teacher: the teacher learns the pictures, and is then matched by the student (DMD2).
# anchor: the student learns the pictures at the times of its steps, and of neutral ones its own
#   output; at the states of its chains it is held to its own output as well.
# plain: the student learns the pictures as any diffusion model, for comparison.
Method = Literal["teacher", "anchor", "plain"]
ANCHOR = 0.5  # weight of the distance to the student before; 0.25 to 0.5 are usual
RANK = 32  # of a LoRA, where the student's recipe has none
REFERENCE = "self"  # a method of models that read a reference picture
MOST = 2000  # training steps of a student, unless more are asked for


@dataclass(frozen=True)
class Settings:
    """What the command's options say.

    steps: Training steps of the student; None is twice those it was distilled in, at most `MOST`.
    teacher_steps: Training steps of the teacher's LoRA.
    rate, teacher_rate: Learning rates; None is that of the student's own run.
    overrides: KEY=VALUE, of the student's run; those of `train` and `eval` also of the teacher's.
    """

    method: Method = "teacher"
    steps: int | None = None
    teacher_steps: int = 1500
    rate: float | None = None
    teacher_rate: float | None = None
    seed: int = 0
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Places:
    """The folders and files of a tuning.

    out: The student's run.
    data: The pictures.
    tuned: The run of an earlier tuning's teacher, which is taken; None trains one beside `out`.
    """

    out: Path
    data: Path
    tuned: Path | None = None

    @property
    def teacher(self) -> Path:
        """The run of the teacher's LoRA."""
        return self.tuned or self.out.with_name(f"{self.out.name}-teacher")

    @property
    def pictures(self) -> Path:
        """What the teacher's LoRA learns from: the pictures, and the teacher's own."""
        return self.teacher / ".pictures"

    @property
    def prompts(self) -> Path:
        """What the student learns from: captions, and neutral prompts."""
        return self.teacher / ".prompts.txt"


def check_method(method: str) -> Method:
    """The method of that name.

    Raises:
        UserError: there is none.
    """
    if method == REFERENCE:
        raise UserError(
            "--method self: on-policy self-distillation needs a model that reads a reference "
            "picture beside the caption, and this one reads captions alone; use --method teacher"
        )
    if method not in get_args(Method):
        raise UserError(f"--method {method!r}: {nearest(method, get_args(Method))}")
    return method  # pyright: ignore[reportReturnType]


def teacher_recipe(student: Tunable, places: Places, settings: Settings, own: int) -> Recipe:
    """The run that trains the teacher's LoRA on the pictures; unguided, and not measured.

    Args:
        own: How many of the pictures are the user's; they come first.

    Its exported student is the teacher with the LoRA in the student's few steps: what is left of a
    tuned student that lost its steps.
    """
    base, train = student.recipe.tree(), student.recipe.train
    tree = {
        "teacher": {**base["teacher"], "guidance": 1.0},
        "student": {**base["student"], "init": None},
        "objective": {"name": "finetune", "known_from": own},
        "adapters": lora_like(student),
        "players": {"student": player(student, settings.teacher_rate, settings.teacher_steps)},
        "data": {"source": str(places.pictures), "captions": "txt", "size": base["data"]["size"]},
        "train": {**base["train"], "steps": settings.teacher_steps, "seed": settings.seed,
                  "sample_every": 0, "save_every": min(train.save_every, settings.teacher_steps)},
    }  # fmt: skip
    return Recipe.check(tree, "distill tune: the teacher's recipe")


def student_recipe(student: Tunable, places: Places, settings: Settings, own: int) -> Recipe:
    """The run that tunes the student.

    Args:
        own: How many of the teacher's pictures are the user's; they come first.
    """
    base = student.recipe.tree()
    steps = settings.steps or min(2 * student.recipe.train.steps, MOST)
    match = settings.method == "teacher"
    tree = {
        **base,
        "players": {"student": player(student, settings.rate, steps, match)},
        "train": {**base["train"], "steps": steps, "seed": settings.seed},
        "eval": {**base["eval"], "teacher_seeds": 0},  # measured with the student's own run
        "critic": None,
    }
    tree = matched(tree, student, places) if match else fitted(tree, student, places)
    if settings.method == "anchor":
        tree["objective"] |= {"anchor": ANCHOR, "where": "steps", "known_from": own}
        tree["data"] |= {"source": str(places.pictures), "captions": "txt"}
    return Recipe.check(override(tree, settings.overrides), "distill tune")


def matched(tree: dict[str, Any], student: Tunable, places: Places) -> dict[str, Any]:
    """The recipe of the method `teacher`: DMD2 from the student as it is, of the tuned teacher."""
    base = student.recipe
    own = base.objective["name"] in ("dmd2", "dmd2-anchored")
    players = {"student": tree["players"]["student"]}
    if own and "fake" in base.players:
        players["fake"] = base.tree()["players"]["fake"]
    return {
        **tree,
        "teacher": tuned_teacher(student, places),
        "student": {**tree["student"], "init": str(student.folder.resolve())},
        "objective": {**(base.objective if own else {}), "name": "dmd2-anchored",
                      "known_from": OWN_PROMPTS},
        "adapters": adapters_of(student),
        "players": players,
        "data": {"prompts": str(places.prompts)},
    }  # fmt: skip


def fitted(tree: dict[str, Any], student: Tunable, places: Places) -> dict[str, Any]:
    """The recipe of the methods `anchor` and `plain`: a new adapter on the student's own weights.

    These are the teacher's with the student's LoRA in them, so that the files of the run fit the
    plain base; of a student without LoRA, they are the student's folder.
    """
    if student.lora is None:
        teacher: dict[str, Any] = {"source": str(student.folder.resolve())}
    else:
        entry = {"file": str(student.lora.resolve()), "strength": 1.0}
        before = tree["teacher"]
        teacher = {**before, "guidance": 1.0, "adapters": [*(before["adapters"] or ()), entry]}
    return {
        **tree,
        "teacher": teacher,
        "student": {**tree["student"], "init": None},
        "objective": {"name": "finetune"},
        "adapters": lora_like(student),
        "data": {"source": str(places.data.resolve()), "size": tree["data"]["size"]},
    }


def tuned_teacher(student: Tunable, places: Places) -> dict[str, Any]:
    """The section of the teacher with the LoRA that it learned, guided as it was."""
    before = student.recipe.tree()["teacher"]
    name = TURBO[DIFFUSERS] if before["adapters"] else DIFFUSERS
    entry = {"file": str(places.teacher.resolve() / "lora" / name), "strength": 1.0}
    return {**before, "adapters": [*(before["adapters"] or ()), entry]}


def player(
    student: Tunable, rate: float | None, steps: int, matches: bool = False
) -> dict[str, Any]:
    """The optimizer of the student's own run, with a rise over a tenth of the steps.

    Adapters are not decayed: decay pulls them towards the network without them.

    Args:
        matches: Whether the student is matched as in its own run, whose momentum then fits.
    """
    before = student.recipe.tree()["players"].get("student", {})
    changes: dict[str, Any] = {"warmup": steps // 10, "weight_decay": 0.0}
    if not matches:
        changes["betas"] = OptimizerConfig.betas
    if rate is not None:
        changes["lr"] = rate
    return {**before, **changes}


def adapters_of(student: Tunable) -> dict[str, Any]:
    """The adapters of the student's own run, or LoRA of the usual size for all networks."""
    section = student.recipe.tree()["adapters"] or {"rank": RANK}
    return {**section, "players": None}


def lora_like(student: Tunable) -> dict[str, Any]:
    """A plain LoRA of the size of the student's adapter: other kinds have no LoRA file."""
    return {**adapters_of(student), "kind": "lora"}
