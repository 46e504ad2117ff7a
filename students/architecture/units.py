"""Units of a network: the residual layers that it can do without, since they keep their shape.

Removing one leaves a network that still runs: what came in goes out. LAPTOP-Diff (arXiv:2404.11098)
scores them, SnapFusion (arXiv:2306.00980) and BK-SDM (arXiv:2305.15798) remove them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from teachers.compiled import eagerly
from teachers.errors import UserError, nearest
from teachers.features import blocks_of, modules_around, replaced
from teachers.reduced.network import Removed
from teachers.reduced.repeated import Repeated

LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")


def units(backbone: nn.Module) -> dict[str, nn.Module]:
    """The units of a backbone by name, in its own order; without any, an empty mapping.

    Of UNets they are residual blocks whose channels stay, and attentions; of networks of equal
    blocks, such as DiT's, the blocks.
    """
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
        if keeps or parent in LISTS:
            found[name] = module
    return found


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
    known = units(backbone)
    for name in names:
        if name not in known:
            raise UserError(f"{key}: {name!r} is no layer that can go; {nearest(name, [*known])}")


def size_of(module: nn.Module) -> int:
    """The number of a module's weights."""
    return sum(p.numel() for p in module.parameters())
