"""DeepCache (arXiv:2312.00858): keep the output of a UNet's deep part and use it in the next calls.

A-SDM (arXiv:2406.00210) chooses single layers instead, which inherit from the last whole call: in
shallow calls a named layer adds what it added then, and all others run.

The inner levels of a UNet change little from one sampling step to the next. Of every `interval`
calls one is whole; the others are shallow: they run only the outermost level, which reads the deep
output of the last whole call. The paper may also cut inside a level; here the cut is between
levels. What was kept may pass through a `Feedback` in each shallow call (ILF, arXiv:2501.13107).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import Tensor, nn

from teachers.errors import UserError
from teachers.features import blocks_of, hooked, replaced
from teachers.reduced.feedback import inner_blocks


class DeepCache(AbstractContextManager["DeepCache"]):
    """A diffusers UNet that keeps its deep output while in this context, for one sampling run.

    A run calls the network with one batch, whose rows keep their places. Weights and modules do not
    change: in a shallow call each deep block returns its input, and the last one returns the kept
    output. Entering the context again clears what was kept; the counts continue.

    Args:
        interval: Calls from one whole call to the next; with 1 every call is whole.
        feedback: From the kept output (B, C, ...) and the embedding (B, D) of a shallow call's time
            to what this call reads, and keeps; by default the kept output.
        units: Names of residual layers that are kept in place of the inner levels. What a layer
            adds to its input is kept, so that a shallow call's own input passes through.

    Raises:
        UserError: the network is not such a UNet, has one level, or its deep blocks are compiled;
            or it has no such units.
    """

    def __init__(
        self,
        backbone: nn.Module,
        interval: int,
        feedback: Callable[..., Tensor] | None = None,
        units: Sequence[str] = (),
    ) -> None:
        self.backbone, self.interval, self.feedback = backbone, interval, feedback
        self._added: dict[nn.Module, Tensor] = {}
        self.last: nn.Module | None = None
        if units:
            kept = blocks_of(backbone, units, "inherit").values()
            self._deep = [(unit, self._inheriting(unit)) for unit in kept]
        else:
            stand_ins, last = deep_part(backbone)
            deep = blocks_of(backbone, [*stand_ins, last], "DeepCache")
            self._deep = [(deep[name], forward) for name, forward in stand_ins.items()]
            self.last = deep[last]
            self._deep.append((self.last, self._carry))
        self.whole, self.shallow = 0, 0  # samples
        self._calls, self._deep_output = 0, None
        self._hooks, self._replaced = ExitStack(), ExitStack()

    def __enter__(self) -> DeepCache:
        self._calls, self._deep_output = 0, None
        self._hooks.enter_context(hooked(self.backbone, self._end, self._begin, always=True))
        if self.last is not None:
            self._hooks.enter_context(hooked(self.last, self._keep))
            return self
        for unit, _ in self._deep:
            self._hooks.enter_context(hooked(unit, self._keep_added))
        return self

    def __exit__(self, *why: object) -> None:
        self._replaced.close()
        self._hooks.close()
        self._deep_output = None
        self._added.clear()

    def _begin(self, backbone: nn.Module, args: tuple[Any, ...]) -> None:
        whole = self._calls % self.interval == 0
        self._calls += 1
        if whole:
            self.whole += len(args[0])
            return
        self.shallow += len(args[0])
        for block, stand_in in self._deep:
            self._replaced.enter_context(replaced(block, stand_in))

    def _end(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        self._replaced.close()

    def _carry(self, hidden_states: Tensor, skips: Any = (), temb: Any = None, **_: Any) -> Any:
        kept = self._deep_output
        return kept if self.feedback is None else self.feedback(kept, temb)  # `_keep` keeps it

    def _keep(self, block: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
        self._deep_output = output

    def _keep_added(self, unit: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        if (self._calls - 1) % self.interval == 0:  # the calls of a whole one
            x = args[0] if args else kwargs["hidden_states"]
            self._added[unit] = (output[0] if isinstance(output, tuple) else output) - x

    def _inheriting(self, unit: nn.Module) -> Callable[..., Any]:
        """The forward of a unit in a shallow call."""

        def forward(
            hidden_states: Tensor, *_: Any, return_dict: bool = True, **__: Any
        ) -> Tensor | tuple[Tensor]:
            out = hidden_states + self._added[unit]
            return out if return_dict else (out,)

        return forward


# Blocks with one call signature, which return one skip connection for each resnet and downsampler.
BLOCKS = {f"{kind}{way}Block2D" for kind in ("", "Attn", "CrossAttn", "SimpleCrossAttn")
          for way in ("Down", "Up")}  # fmt: skip
BLOCKS |= {"ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"}


def deep_part(backbone: nn.Module) -> tuple[dict[str, Callable[..., Any]], str]:
    """The blocks inside the outermost level, by name.

    Returns:
        All of them but the last, each with the `forward` of a shallow call, and the last one.

    Raises:
        UserError: the network is not one of diffusers' UNets, or has one level.
    """
    from diffusers import UNet2DConditionModel, UNet2DModel

    if not isinstance(backbone, UNet2DModel | UNet2DConditionModel):
        raise UserError(
            f"cache: a {type(backbone).__name__} is no UNet of diffusers; leave cache out"
        )
    down: list[Any] = list(backbone.down_blocks)
    up: list[Any] = list(backbone.up_blocks)
    if strange := [n for b in (*down, *up) if (n := type(b).__name__) not in BLOCKS]:
        raise UserError(
            f"cache: a UNet with a {strange[0]} has no level that can be kept; leave cache out"
        )
    if len(down) < 2:
        raise UserError(
            "cache: the UNet has one level, and nothing deeper to keep; leave cache out"
        )
    return inner_blocks(backbone)
