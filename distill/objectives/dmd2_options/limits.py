"""What DMD2's options need of the student and of each other."""

from __future__ import annotations

from teachers.errors import UserError


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
