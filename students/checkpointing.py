"""Activation checkpointing: the backward pass recomputes blocks as they ran before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from students.adapter_layers import active_adapter, using
from students.two_time import Shifts, current_shifts, shifted
from teachers.errors import UserError


def checkpointing(backbone: Any) -> None:
    """Keep no activations inside the backbone's blocks; recompute them.

    A block is recomputed under the adapter and the landing time of its forward pass, since another
    network may have used the backbone in between.

    Raises:
        UserError: the backbone's class does not support checkpointing.
    """

    def run_block(block: Any, *args: Any) -> Any:
        name, shifts = active_adapter(backbone), current_shifts(backbone)
        call = block.__call__ if isinstance(block, nn.Module) else block
        contexts = lambda: (nullcontext(), replayed(backbone, name, shifts))  # noqa: E731
        return checkpoint(call, *args, use_reentrant=False, context_fn=contexts)

    try:
        backbone.enable_gradient_checkpointing(run_block)
    except ValueError as error:
        raise UserError(f"train.checkpointing: {str(error).splitlines()[0]}") from None


@contextmanager
def replayed(backbone: nn.Module, adapter: str | None, shifts: Shifts | None) -> Iterator[None]:
    """Run the backbone under this adapter and with these shifts of its time embedding."""
    with using(backbone, adapter), shifted(backbone, shifts):
        yield
