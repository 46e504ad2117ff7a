"""Text encoders during a rehearsal: each is on the device only while it computes.

A rehearsal samples a stock pipeline and the student for each step count, with the same prompts. So
that an encoder never is on the device beside the networks in training, its outputs are recorded
before these are there, and given again for the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from teachers.denoiser import Cond
from teachers.families.base import Prompted
from teachers.teacher import Teacher

HOST = torch.device("cpu")


class RecordedEncoders:
    """The networks of a teacher's codec other than its VAE, and their recorded outputs.

    Args:
        device: Where they compute.
    """

    def __init__(self, teacher: Teacher, device: torch.device) -> None:
        self.codec, self.device = teacher.codec, device
        self.modules: list[nn.Module] = []
        if isinstance(codec := teacher.codec, Prompted):
            parts = {k: v for k, v in codec.pipe.components.items() if k != codec.kind.PART}
            self.modules = [
                v for v in parts.values() if isinstance(v, nn.Module) and v is not codec.vae
            ]
        self.outputs: dict[Any, Any] = {}

    @torch.no_grad()
    def condition(self, prompts: list[Any]) -> Cond:
        """The codec's condition of the prompts, on the host; recorded for later calls."""
        with self.on_host(HOST):
            return self.codec.condition(prompts)

    @contextmanager
    def on_host(self, caller: torch.device) -> Iterator[None]:
        """Within it, encoders are on the host and answer from the record.

        For inputs that are not recorded, an encoder moves to the device during the call.

        Args:
            caller: The device of the other parts of the pipeline that calls them.
        """
        with ExitStack() as stack:
            for number, module in enumerate(self.modules):
                stack.enter_context(self._replaced(number, module.to(HOST), caller))
            yield

    @contextmanager
    def _replaced(self, number: int, module: nn.Module, caller: torch.device) -> Iterator[None]:
        """Within it, the module's forward looks into the record first.

        `_hf_hook` is where diffusers finds the device of a module that is offloaded.
        """
        before = {k: v for k, v in vars(module).items() if k in ("forward", "_hf_hook")}
        module.forward = self._recorded(number, module, module.forward)
        module._hf_hook = SimpleNamespace(execution_device=caller)  # pyright: ignore
        try:
            yield
        finally:
            del module.forward, module._hf_hook
            vars(module).update(before)

    def _recorded(
        self, number: int, module: nn.Module, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        @wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            values, spec = pytree.tree_flatten((args, kwargs))
            key = (number, str(spec), *map(_content, values))
            if key not in self.outputs:
                module.to(self.device)
                try:
                    here = [_moved(v, self.device) for v in values]
                    args, kwargs = pytree.tree_unflatten(here, spec)
                    out = forward(*args, **kwargs)
                    self.outputs[key] = pytree.tree_map(lambda v: _moved(v, HOST), out)
                finally:
                    module.to(HOST)
            caller = next((v.device for v in values if isinstance(v, Tensor)), self.device)
            return pytree.tree_map(lambda v: _moved(v, caller), self.outputs[key])

        return call


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _content(value: Any) -> Any:
    """What two equal inputs have in common: shape, type and bytes."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return tuple(value.shape), str(value.dtype), flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), value.tobytes()
    return repr(value)
