"""Units of a network: the residual layers that it can do without, since they keep their shape.

Removing one leaves a network that still runs: what came in goes out. LAPTOP-Diff (arXiv:2404.11098)
scores them, SnapFusion (arXiv:2306.00980) and BK-SDM (arXiv:2305.15798) remove them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from teachers.compiled import eagerly
from teachers.errors import UserError, nearest
from teachers.features import blocks_of, modules_around, replaced
from teachers.reduced.layers import share_weights
from teachers.reduced.network import Removed
from teachers.reduced.repeated import Repeated

LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")


def units(backbone: nn.Module) -> dict[str, nn.Module]:
    """The units of a backbone by name, in its own order; without any, an empty mapping.

    Of UNets they are residual blocks whose channels stay, and attentions, or the blocks of an
    attention that has several (SDXL's have up to ten); of networks of equal blocks, such as DiT's,
    the blocks.
    """
    found = removable(backbone)
    whole = {n.rpartition(".transformer_blocks.")[0] for n in found}
    return {n: m for n, m in found.items() if n not in whole}


def removable(backbone: nn.Module) -> dict[str, nn.Module]:
    """The units by name, and the attentions that some of them are parts of."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    found = {}
    for name, module in backbone.named_modules():
        parent = name.rpartition(".")[0]
        if parent.rpartition(".")[2] not in ("resnets", "attentions", *LISTS):
            continue
        if isinstance(module, ResnetBlock2D):
            keeps = module.conv_shortcut is None and module.upsample is module.downsample is None
        elif isinstance(module, Attention):  # not those inside a transformer's block
            keeps = parent.endswith("attentions") and module.residual_connection
        else:
            keeps = isinstance(module, Transformer2DModel | Repeated)
        if keeps or parent in LISTS or in_a_stack(backbone, parent):
            found[name] = module
    if feeds_the_output(backbone):
        del found["transformer_blocks.0"]
    return found


def feeds_the_output(backbone: nn.Module) -> bool:
    """Whether a DiT's first block has an embedding that no other has: its output layer reads it.

    All blocks of published DiTs have the same one, which diffusers keeps once for each.
    """
    from diffusers import DiTTransformer2DModel

    if not isinstance(backbone, DiTTransformer2DModel):
        return False
    blocks: Any = backbone.transformer_blocks
    first, *others = (block.norm1.emb.state_dict() for block in blocks)
    pairs = [(v, other[name]) for name, v in first.items() for other in others]
    return not any(isinstance(v, FakeTensor) for v, _ in pairs) and not all(
        torch.equal(v, other) for v, other in pairs
    )


@dataclass(frozen=True)
class Width:
    """The heads of an attention, or the inner neurons of a feed-forward layer.

    count: How many there are.
    out: The name of the linear layer that reads them, in parts of equal width.
    """

    kind: Literal["heads", "neurons"]
    count: int
    out: str


def widths(backbone: nn.Module) -> dict[str, Width]:
    """What layers of a backbone are made of and can do with less of, by the layers' names.

    Not of attentions whose heads share weights.
    """
    from diffusers.models.attention import FeedForward
    from diffusers.models.attention_processor import Attention

    found = {}
    for name, module in backbone.named_modules():
        net: Any = module
        if isinstance(module, Attention) and not share_weights(module):
            found[name] = Width("heads", net.heads, f"{name}.to_out.0")
        elif isinstance(module, FeedForward):
            found[name] = Width("neurons", net.net[2].in_features, f"{name}.net.2")
    return found


def in_a_stack(backbone: nn.Module, parent: str) -> bool:
    """Whether modules of this parent are an attention's blocks, of which it has several."""
    if not parent.endswith(".transformer_blocks") or ".attentions." not in parent:
        return False
    return len(list(backbone.get_submodule(parent).children())) > 1


@contextmanager
def skipping(backbone: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Within it, the network runs without some of its units."""
    gone, names = Removed(), [*names]
    with ExitStack() as stack:
        stack.enter_context(eagerly(modules_around(backbone, names)))
        for module in blocks_of(backbone, names, "units").values():
            stack.enter_context(replaced(module, gone.forward))
        yield


def check_units(backbone: nn.Module, names: Iterable[str], key: str) -> None:
    """Refuse names that are no units.

    Raises:
        UserError: naming the key and the nearest unit.
    """
    known = removable(backbone)
    for name in names:
        if name not in known:
            raise UserError(f"{key}: {name!r} is no layer that can go; {nearest(name, [*known])}")


def size_of(module: nn.Module) -> int:
    """The number of a module's weights."""
    return sum(p.numel() for p in module.parameters())
