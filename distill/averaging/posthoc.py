"""Post-hoc EMA: the average of any length, from snapshots of averages of other lengths.

Karras et al. 2023 (arXiv:2312.02696), with their power functions: an average at update t has the
profile p(τ) = (γ + 1) τ^γ / t^(γ + 1) on [0, t]. The profiles of the snapshots are combined so that
they are nearest to the wanted one in L², and the weights with the same coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.training.ema import SNAPSHOTS, exponent
from teachers.errors import UserError, plural

LARGEST_ERROR = 0.1  # of a profile; eight snapshots of two lengths are off by 0.0135 between them


class Snapshot(NamedTuple):
    """An average that was saved during training.

    length: Relative.
    updates: How many updates it had seen.
    """

    file: Path
    length: float
    updates: int

    def tensor(self, number: int) -> Tensor:
        """The average of the parameter of that number.

        Raises:
            UserError: the file cannot be read, or the average is not finite.
        """
        try:
            with safe_open(self.file, framework="pt") as file:
                value = file.get_tensor(f"{self.length:g}/{number}")
        except (SafetensorError, OSError) as error:
            raise damaged(self.file, error) from None
        if not value.isfinite().all():
            raise damaged(self.file, "an average of it is not finite")
        return value


def damaged(file: Path, error: Exception | str) -> UserError:
    """The error about a file that holds no averages of this run."""
    return UserError(f"RUN: {file} is damaged ({error}); delete it")


def inner(t: Tensor, gamma: Tensor, other_t: Tensor, other_gamma: Tensor) -> Tensor:
    """∫ p q dτ of two profiles; all arguments broadcast, in float64."""
    ratio = t / other_t
    power = torch.where(t < other_t, other_gamma, -gamma)
    scale = (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1)
    return scale * ratio**power / torch.maximum(t, other_t)


def coefficients(updates: Tensor, gammas: Tensor, at: float, gamma: float) -> Tensor:
    """Coefficients (N,) of the snapshots, whose sum is 1; some are negative.

    The solution's own sum is 1 to 0.2 %; it is divided by it, so that weights keep their scale.

    Args:
        updates, gammas: Of the N snapshots.
        at, gamma: The wanted average's.
    """
    t, g = updates.double(), gammas.double()
    gram = inner(t[:, None], g[:, None], t[None], g[None])
    target = inner(t, g, torch.tensor(float(at)).double(), torch.tensor(gamma).double())
    solution = torch.linalg.lstsq(gram, target[:, None], driver="gelsd").solution[:, 0]
    return solution / solution.sum()


def error_of(updates: Tensor, gammas: Tensor, at: float, gamma: float) -> float:
    """How far the combined profile is from the wanted one, in L2 relative to the wanted one's norm.

    Args: as of `coefficients`.
    """
    t, g, one = updates.double(), gammas.double(), torch.tensor(float(at)).double()
    wanted, c = torch.tensor(gamma).double(), coefficients(updates, gammas, at, gamma)
    gram, norm = inner(t[:, None], g[:, None], t[None], g[None]), inner(one, wanted, one, wanted)
    square = c @ gram @ c - 2 * c @ inner(t, g, one, wanted) + norm
    return (square.clamp(min=0) / norm).sqrt().item()


def snapshots(run: Path) -> list[Snapshot]:
    """The snapshots of a run's last stage, the oldest first.

    Raises:
        UserError: there are none, or a file is damaged.
    """
    found: list[tuple[int, Snapshot]] = []
    for file in sorted((run / SNAPSHOTS).glob("step-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                about = opened.metadata()
                lengths = {k.partition("/")[0] for k in opened.keys()}  # noqa: SIM118
            updates, stage = int(about["updates"]), int(about["stage"])
            entries = [Snapshot(file, float(v), updates) for v in sorted(lengths)]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(file, error) from None
        found += [(stage, entry) for entry in entries]
    if not found:
        raise UserError(
            f"RUN: {run} has no averages for --ema-length; train with train.ema_lengths=[0.05,0.1]"
        )
    last = max(stage for stage, _ in found)
    return [entry for stage, entry in found if stage == last]


def averaged(entries: list[Snapshot], length: float, count: int) -> tuple[Tensor, Iterator[Tensor]]:
    """The average of that length at the last snapshot.

    Args:
        count: Of the parameters.

    Returns:
        The coefficients of the snapshots, and each parameter's average in float64.

    Raises:
        UserError: the snapshots cannot express that length.
    """
    updates = torch.tensor([e.updates for e in entries])
    gammas = torch.tensor([exponent(e.length) for e in entries]).double()
    wanted = int(updates.max()), exponent(length)
    if (error := error_of(updates, gammas, *wanted)) > LARGEST_ERROR:
        kept = ", ".join(f"{v:g}" for v in sorted({e.length for e in entries}))
        raise UserError(
            f"--ema-length {length:g}: {len(entries)} {plural(len(entries), 'snapshot')} of length "
            f"{kept} give another average: its profile would be off by {error:.0%}; give a length "
            "between theirs, or train with other train.ema_lengths and a smaller train.save_every"
        )
    c = coefficients(updates, gammas, *wanted)

    def parameters() -> Iterator[Tensor]:
        for number in range(count):
            parts = (v.tensor(number).double() for v in entries)
            yield sum((w * p for w, p in zip(c.tolist(), parts, strict=True)), torch.zeros(()))

    return c, parameters()
