"""x̂ of every output of a network that has several: the iterates of GET.

Such a backbone has a method `outputs(x_t, t, cond)` -> (B, T, ...), and its forward returns the
last of the T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from students.lora import innermost
from teachers.denoiser import Denoiser
from teachers.errors import UserError


def check_outputs(denoiser: Denoiser, key: str) -> None:
    """Refuse a network that has one output.

    Raises:
        UserError: naming the key that asks for several.
    """
    backbone = getattr(innermost(denoiser), "backbone", None)
    if not callable(getattr(backbone, "outputs", None)):
        raise UserError(
            f"{key}: the student's network, {type(backbone).__name__}, has no method outputs(x_t, "
            "t, cond) of several outputs; remove the key, or name another student.architecture"
        )


@contextmanager
def several_outputs(
    denoiser: Denoiser, x_t: Tensor, t: Tensor
) -> Iterator[Callable[[], list[Tensor]]]:
    """Within it, all outputs of the next call of the network at x_t and t are kept.

    Yields:
        A function that returns x̂ (B, ...) of each, with its graph; of a network that has one
        output, an empty list.
    """
    network: Any = innermost(denoiser)
    backbone: Any = getattr(network, "backbone", None)
    kept: list[Tensor] = []
    method = getattr(backbone, "outputs", None)
    if method is None:
        yield list
        return

    def outputs(*args: Any) -> Tensor:
        kept.append(method(*args))
        return kept[-1]

    backbone.outputs = outputs
    try:
        yield lambda: [network.denoised(x_t, t, part) for part in kept[0].unbind(1)]
    finally:
        del backbone.outputs
