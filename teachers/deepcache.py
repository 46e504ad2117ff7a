"""DeepCache (arXiv:2312.00858): a UNet's deep part, kept from one call and used again in the next.

Between neighbouring steps what a UNet's inner levels make changes little. Of every `interval` calls
one is whole; in the others only the outermost level is run, and where it reads what comes up from
below, it reads what came up then. The paper may also cut inside a level; here it is between levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from teachers.errors import UserError


class DeepCache(AbstractContextManager["DeepCache"]):
    """One of diffusers' UNets whose deep part is kept while in this context, for one walk.

    A walk calls the network with one batch, whose rows keep their places. Weights and modules stay
    what they are: in a shallow call the deep blocks hand their input on, and the last of them hands
    on what was kept. On entering again nothing is kept of before; the counts go on.

    Args:
        interval: Calls from one whole call to the next; with 1 all are.

    Raises:
        UserError: the network is no such UNet, or has one level.
    """

    def __init__(self, backbone: nn.Module, interval: int) -> None:
        self.backbone, self.interval = backbone, interval
        self.deep, self.last = deep_part(backbone)
        self.whole, self.shallow = 0, 0  # samples
        self._calls, self._kept = 0, None
        self._hooks, self._replaced = ExitStack(), ExitStack()

    def __enter__(self) -> DeepCache:
        self._calls, self._kept = 0, None
        hooks = (
            self.backbone.register_forward_pre_hook(self._begin),
            self.backbone.register_forward_hook(self._end, always_call=True),
            self.last.register_forward_hook(self._keep),
        )
        for hook in hooks:
            self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *why: object) -> None:
        self._replaced.close()
        self._hooks.close()
        self._kept = None

    def _begin(self, backbone: nn.Module, args: tuple[Any, ...]) -> None:
        whole = self._calls % self.interval == 0
        self._calls += 1
        if whole:
            self.whole += len(args[0])
            return
        self.shallow += len(args[0])
        for module, stand_in in self.deep.items():
            self._replaced.enter_context(replaced(module, stand_in))
        self._replaced.enter_context(replaced(self.last, lambda *_, **__: self._kept))

    def _end(self, backbone: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._replaced.close()

    def _keep(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._kept = output


# What is called alike and returns alike: one skip connection for each resnet and downsampler.
BLOCKS = {f"{kind}{way}Block2D" for kind in ("", "Attn", "CrossAttn", "SimpleCrossAttn")
          for way in ("Down", "Up")}  # fmt: skip
BLOCKS |= {"ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"}


def deep_part(backbone: nn.Module) -> tuple[dict[nn.Module, Callable[..., Any]], nn.Module]:
    """All that is inside the outermost level, with what stands in for it, and its last block.

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
            "cache: its UNet has one level, and nothing deeper to keep; leave cache out"
        )
    deep: dict[nn.Module, Callable[..., Any]] = dict.fromkeys(down[0].downsamplers or (), given)
    deep |= {block: skipped(block) for block in down[1:]}
    middle: list[Any] = [] if backbone.mid_block is None else [backbone.mid_block]
    return deep | dict.fromkeys((*middle, *up[:-2]), given), up[-2]


def given(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """A block that hands its input on."""
    return hidden_states


def skipped(block: Any) -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
    """A down block that hands its input on, also as the skip connections that nothing will read."""
    count = len(block.resnets) + len(block.downsamplers or ())

    def hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        return hidden_states, (hidden_states,) * count

    return hand_on


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Have `forward` in place of the module's own."""
    before = vars(module).get("forward")  # where something else has replaced it
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
