"""One frozen backbone, many networks: each player is an adapter on the teacher's own weights.

Adapters are *used*, never *set*: PEFT's `set_adapter` also flips requires_grad, and autograd then
silently drops the gradients of a graph that was already built. Here which adapter is used follows
the forward pass, and which one learns is its player's business. All adapted layers of a network
read the choice from one shared cell, so that choosing costs the same for 5 layers and for 5,000.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from teachers.denoiser import Cond, Denoiser, Wrapper
from teachers.errors import WORD, UserError, cut, quoted
from teachers.families.base import Pretrained
from teachers.storage.diffusers_config import Schedule
from teachers.teacher import Teacher

Module = TypeVar("Module", bound=nn.Module)
_LAYERS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()  # adapted ones, by module
_CLASSES: dict[type, type] = {}  # of PEFT's layers, their forms that read the shared cell


class Choice:
    """Which adapter the layers of a network run under; one object for all of them.

    name: The adapter's; None is the base weights.
    """

    def __init__(self) -> None:
        self.name: str | None = None


class _Chosen:
    """Mixed into a PEFT layer's class: its adapter is that of a shared `Choice`.

    PEFT writes the two attributes when adapters are made or merged; what it writes then is of no
    account, as every call is made under `using`.
    """

    _choice: Choice

    @property
    def _active_adapter(self) -> list[str]:
        return [] if self._choice.name is None else [self._choice.name]

    @_active_adapter.setter
    def _active_adapter(self, value: Any) -> None:
        pass

    @property
    def _disable_adapters(self) -> bool:
        return self._choice.name is None

    @_disable_adapters.setter
    def _disable_adapters(self, value: bool) -> None:
        pass


@dataclass(frozen=True)
class Adapter:
    """The shape of an adapter: low-rank changes to the layers that `targets` matches."""

    kind: Literal["lora", "dora", "loha", "lokr"] = "lora"
    rank: int = 64
    alpha: float | None = None  # changes are scaled by alpha / rank; by default by 1
    targets: str | None = None  # a regex of module names; by default the family's own

    def config(self, family: str) -> Any:
        """PEFT's config for it; `family` is the regex for when `targets` names none."""
        import peft

        alpha = self.rank if self.alpha is None else self.alpha
        targets = family if self.targets is None else self.targets
        if self.kind in ("lora", "dora"):
            return peft.LoraConfig(
                r=self.rank,
                lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
                target_modules=targets,
                use_dora=self.kind == "dora",
            )
        kind = peft.LoHaConfig if self.kind == "loha" else peft.LoKrConfig
        return kind(r=self.rank, alpha=alpha, target_modules=targets)  # pyright: ignore


class Adapted(Denoiser):
    """A denoiser run under one adapter on weights that it shares and never changes.

    Its parameters are its adapter's: the denoiser is used, not owned. A deep copy is one more
    adapter on the same weights, equal to this one.

    Args:
        denoiser: The shared network.
        name: The adapter's; None is the frozen base.
        config: PEFT's, to create the adapter, which begins as no change; None takes one that is
            already there.

    Raises:
        UserError: the config's targets match no layer.
    """

    def __init__(self, denoiser: Denoiser, name: str | None, config: Any = None) -> None:
        super().__init__()
        self.name, self.config = name, config
        self._denoiser = (denoiser,)  # in a tuple: not a submodule
        if config is not None:
            assert name is not None
            inject(denoiser, name, config)
        self.names = [k for k, _ in denoiser.named_parameters() if name in k.split(".")]
        weights = dict(denoiser.named_parameters())
        self.weights = nn.ParameterList([weights[k] for k in self.names])

    @property
    def denoiser(self) -> Denoiser:
        return self._denoiser[0]

    @property
    def process(self) -> Any:
        return self.denoiser.process

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, s: Tensor | None = None) -> Tensor:
        with using(self.denoiser, self.name):
            return self.denoiser(x_t, t, cond, s)

    def weight(self, t: Tensor) -> Tensor:
        return self.denoiser.weight(t)

    def trainable(self) -> dict[str, nn.Parameter]:
        """This adapter's weights, by their names in the shared network."""
        return dict(zip(self.names, self.weights, strict=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapted:
        if self.name is None or self.config is None:
            return self._hooked(Adapted(self.denoiser, self.name))
        taken = {k for layer in layers(self.denoiser) for k in adapters(layer)}
        name = next(n for i in range(2, 1000) if (n := f"{self.name}_{i}") not in taken)
        twin = Adapted(self.denoiser, name, self.config)
        twin.load_state_dict(self.state_dict())
        return self._hooked(twin.train(self.training))

    def _hooked(self, twin: Adapted) -> Adapted:
        """A copy keeps hooks, as any module's does: what counts calls goes on counting them."""
        twin._forward_pre_hooks.update(self._forward_pre_hooks)
        twin._forward_pre_hooks_with_kwargs.update(self._forward_pre_hooks_with_kwargs)
        return twin


def inject(module: nn.Module, name: str, config: Any) -> None:
    """Add a new adapter to `module`, in float32 and frozen, and use none."""
    from peft import inject_adapter_in_model

    frozen = {p: p.requires_grad for p in module.parameters()}
    try:
        with warnings.catch_warnings():  # several adapters on one network are meant here
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            inject_adapter_in_model(config, module, adapter_name=name)
    except (ValueError, TypeError, re.error) as error:  # PEFT's ways to say so
        reason = cut(str(error).splitlines()[0], WORD)  # PEFT repeats them
        targets = quoted(config.target_modules)
        raise UserError(f"adapters.targets: {targets}: {reason}") from None
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"adapters.rank: {config.r} cannot be made ({reason})") from None
    _LAYERS.clear()
    for key, p in module.named_parameters():
        if name in key.split("."):
            p.data = p.data.float()  # what learns is kept in full precision, whatever the base is
            p.requires_grad_(False)
        else:
            p.requires_grad_(frozen.get(p, False))  # PEFT touches those as well
    share_choice(layers(module))


def share_choice(found: list[Any]) -> None:
    """Make all these layers read one `Choice`, that of those among them that have one."""
    choice = next((m._choice for m in found if isinstance(m, _Chosen)), None) or Choice()
    for layer in found:
        if isinstance(layer, _Chosen):
            continue
        kind = type(layer)
        if kind not in _CLASSES:
            _CLASSES[kind] = type(kind.__name__, (_Chosen, kind), {"__module__": kind.__module__})
        vars(layer).pop("_active_adapter", None)
        vars(layer).pop("_disable_adapters", None)
        layer._choice, layer.__class__ = choice, _CLASSES[kind]


def to_float32(module: Module) -> Module:
    """The module with its weights in float32, as what learns is kept."""
    for p in [*module.parameters(), *module.buffers()]:
        if p.is_floating_point() and p.dtype != torch.float32:
            p.data = p.data.float()
    return module


def layers(module: nn.Module) -> list[Any]:
    """The adapted layers in `module`; looked up once."""
    if module not in _LAYERS:
        from peft.tuners.tuners_utils import BaseTunerLayer

        _LAYERS[module] = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    return _LAYERS[module]


def adapters(layer: Any) -> set[str]:
    """The names of the adapters on one layer."""
    return {k for n in layer.adapter_layer_names if n in vars(layer)["_modules"]
            or n in vars(layer)["_parameters"] for k in getattr(layer, n)}  # fmt: skip


@contextmanager
def using(module: nn.Module, name: str | None) -> Iterator[None]:
    """Run `module` under one adapter (None: the base weights); requires_grad is never touched."""
    choice = choice_of(module)
    before, choice.name = choice.name, name
    try:
        yield
    finally:
        choice.name = before


def choice_of(module: nn.Module) -> Choice:
    """The cell that the adapted layers of `module` read; one that nobody reads where none are."""
    found = layers(module)
    return found[0]._choice if found else Choice()


def used(module: nn.Module) -> str | None:
    """The adapter that `module` is now run under."""
    return choice_of(module).name


def checkpointing(backbone: Any) -> None:
    """Keep no activations inside the backbone's blocks; recompute them, under the same adapter.

    Raises:
        UserError: the backbone's class cannot.
    """

    def again(block: Any, *args: Any) -> Any:
        name = used(backbone)
        call = block.__call__ if isinstance(block, nn.Module) else block
        context = lambda: (nullcontext(), using(backbone, name))  # noqa: E731
        return checkpoint(call, *args, use_reentrant=False, context_fn=context)

    try:
        backbone.enable_gradient_checkpointing(again)
    except ValueError as error:
        raise UserError(f"train.checkpointing: {str(error).splitlines()[0]}") from None


def unwrap(denoiser: Denoiser) -> Pretrained:
    """The pretrained network at the heart of a teacher, a student or a fake score.

    Raises:
        UserError: there is none: it is a closed form, or a network of one's own.
    """
    while isinstance(denoiser, Adapted | Wrapper):
        denoiser = denoiser.denoiser
    if not isinstance(denoiser, Pretrained):
        raise UserError(f"a {type(denoiser).__name__} has no weights that a pipeline could load")
    return denoiser


def adapted(teacher: Teacher, adapter: Adapter, name: str) -> Adapted:
    """A network of the teacher's own form, such as a fake score: an adapter on its weights."""
    source = unwrap(teacher.denoiser)
    return Adapted(under(source, source.schedule), name, adapter.config(source.LORA))


def under(network: Pretrained, schedule: Schedule) -> Pretrained:
    """The same backbone, shared, read by another schedule."""
    twin = copy(network)
    twin._modules = dict(network._modules)
    twin._forward_pre_hooks = type(network._forward_pre_hooks)()
    return twin.adopt(schedule)


@torch.no_grad()
def merged(denoiser: Denoiser) -> nn.Module:
    """The backbone of a student as a module of its own: plain layers, its adapter added in.

    Without an adapter this is the backbone itself.
    """
    backbone: Any = unwrap(denoiser).backbone
    if not isinstance(denoiser, Adapted) or denoiser.name is None:
        return backbone
    plain: dict[str, Tensor] = {}
    for key, value in backbone.state_dict().items():
        if not any(part.startswith(("lora_", "hada_", "lokr_")) for part in key.split(".")):
            plain[key.replace(".base_layer.", ".")] = value
    for key, module in backbone.named_modules():
        if module in layers(backbone) and denoiser.name in adapters(module):
            plain[f"{key}.weight"] = weight_with(module, denoiser.name)
    twin = type(backbone).from_config(backbone.config)
    weight = next(backbone.parameters())
    twin.to(device=weight.device)
    twin.load_state_dict(plain, assign=True)  # some are of a precision of their own
    return twin.eval()


def weight_with(layer: Any, name: str) -> Tensor:
    """A layer's weight with one adapter added in, worked out in float32."""
    base = layer.base_layer.weight
    twin = deepcopy(layer).float()
    twin.merge(adapter_names=[name])
    return twin.base_layer.weight.detach().to(base.dtype)
