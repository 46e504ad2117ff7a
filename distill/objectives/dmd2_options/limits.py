"""What the options of DMD2 (arXiv:2405.14867) need of the student and of each other."""

from __future__ import annotations

from typing import Any

from distill.objectives.dmd2_options.first_step import check_path
from distill.objectives.dmd2_options.matching import check_pull
from distill.objectives.dmd2_options.random_chains import check_chains
from distill.objectives.dmd2_options.split import check_split
from teachers.errors import UserError


def check_options(made: Any) -> None:
    """Refuse options that do not go together, or with the student.

    Args:
        made: A DMD2 or one of its kin.

    Raises:
        UserError: naming the key.
    """
    student, schedule = made.student, made.schedule
    if made.share_samples:
        several = schedule is not None or len(student.times) > 1
        check_sharing(made.fake_sees, several, made.game)
    check_gradients(made.gradient_steps, made.longest)
    if made.first_step:
        check_path(student, made.fake_sees, made.first_step_path)
    if made.ida is not None:
        check_pull(student.denoiser, made.fake)
    if schedule is not None:
        check_chains(schedule, student, made.first_step)
    if made.split is not None:
        if schedule is not None:
            raise UserError(
                "objective.split: chains of random times may have no step on one of its sides; "
                "remove it, or objective.schedule"
            )
        check_split(made.split, student, made.critic, made.gan_weight)


def check_sharing(sees: str, several: bool, game: str) -> None:
    """Refuse shared samples that the fake and the critic would not see by the other keys.

    Args:
        sees: Which x̂ of a chain they learn from.
        several: Whether a chain may have several steps.

    Raises:
        UserError: naming the key.
    """
    if sees == "last" and several:
        raise UserError(
            "objective.share_samples: a student of several steps is trained at every step of "
            "its chain; set objective.fake_sees to places, or share_samples to false"
        )
    if game == "relativistic":
        raise UserError(
            "objective.share_samples: the relativistic game compares samples and data of equal "
            "conditions, and shared samples have others; set it to false"
        )


def check_gradients(steps: int, longest: int) -> None:
    """Refuse gradients through more steps than a chain has.

    Raises:
        UserError: naming the key.
    """
    if steps > longest:
        raise UserError(
            f"objective.gradient_steps: gradients cannot flow through {steps} steps of a student "
            f"of {longest}; set it to at most {longest}"
        )
