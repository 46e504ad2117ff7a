"""Several networks on one frozen backbone: each player is an adapter on the teacher's weights.

`students.adapter_layers.using` selects the adapter of a forward pass. Which adapter learns is
decided by its player alone.
"""

from __future__ import annotations

import re
import warnings
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from students.adapter_layers import (
    adapter_layers,
    adapter_names,
    base_layer,
    forget_layers,
    share_selection,
    using,
)
from teachers.denoiser import Cond, Denoiser, Network, Wrapper
from teachers.errors import WORD, UserError, cut, quoted
from teachers.families.base import Pretrained
from teachers.storage.diffusers_config import Schedule
from teachers.teacher import Teacher

Module = TypeVar("Module", bound=nn.Module)
AnyNetwork = TypeVar("AnyNetwork", bound=Network)


@dataclass(frozen=True)
class Adapter:
    """The kind and size of an adapter: low-rank changes to the layers that `targets` matches."""

    kind: Literal["lora", "dora", "loha", "lokr"] = "lora"
    rank: int = 64
    alpha: float | None = None  # changes are scaled by alpha / rank; None scales by 1
    targets: str | None = None  # a regex of module names; None is the family's own

    def config(self, family: str) -> Any:
        """PEFT's config; `family` is the regex that stands in where `targets` is None."""
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


class AdaptedDenoiser(Denoiser):
    """A denoiser that runs with one adapter on shared, frozen weights.

    Its parameters are the adapter's only. A deep copy is a new adapter on the same weights, with
    equal values.

    Args:
        denoiser: The shared network.
        name: The adapter's name; None runs the frozen weights without an adapter.
        config: PEFT's config, by which the adapter is created; it changes nothing at first. None
            takes the adapter of that name that the network already has.

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
    def inner_denoiser(self) -> Denoiser:
        return self.denoiser

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

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedDenoiser:
        if self.name is None or self.config is None:
            return self._with_hooks(AdaptedDenoiser(self.denoiser, self.name))
        taken = {k for layer in adapter_layers(self.denoiser) for k in adapter_names(layer)}
        name = next(n for i in range(2, 1000) if (n := f"{self.name}_{i}") not in taken)
        twin = AdaptedDenoiser(self.denoiser, name, self.config)
        twin.load_state_dict(self.state_dict())
        return self._with_hooks(twin.train(self.training))

    def _with_hooks(self, twin: AdaptedDenoiser) -> AdaptedDenoiser:
        """The copy with this module's forward hooks, so that its calls are counted as well."""
        twin._forward_pre_hooks.update(self._forward_pre_hooks)
        twin._forward_pre_hooks_with_kwargs.update(self._forward_pre_hooks_with_kwargs)
        return twin


def inject(module: nn.Module, name: str, config: Any) -> None:
    """Add a new adapter to `module`, in float32 and frozen; no adapter is active afterwards.

    Raises:
        UserError: the targets match no layer, or the adapter is too large.
    """
    from peft import inject_adapter_in_model

    frozen = {p: p.requires_grad for p in module.parameters()}
    try:
        with warnings.catch_warnings():  # several adapters on one network are meant here
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            inject_adapter_in_model(config, module, adapter_name=name)
    except (ValueError, TypeError, re.error) as error:  # PEFT on targets that match nothing
        reason = cut(str(error).splitlines()[0], WORD)  # PEFT repeats the targets
        targets = quoted(config.target_modules)
        raise UserError(f"adapters.targets: {targets}: {reason}; name other layers") from None
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"adapters.rank: an adapter of rank {config.r} cannot be created ({reason}); lower it"
        ) from None
    forget_layers()
    for key, p in module.named_parameters():
        if name in key.split("."):
            p.data = p.data.float()  # what learns is float32, whatever the base is
            p.requires_grad_(False)
        else:
            p.requires_grad_(frozen.get(p, False))  # PEFT changes it
    share_selection(adapter_layers(module))


def to_float32(module: Module) -> Module:
    """Convert the module's weights and buffers to float32, in place: what learns is float32."""
    for p in [*module.parameters(), *module.buffers()]:
        if p.is_floating_point() and p.dtype != torch.float32:
            p.data = p.data.float()
    return module


def innermost(denoiser: Denoiser) -> Denoiser:
    """The denoiser inside all wrappers and adapters."""
    while (inner := denoiser.inner_denoiser) is not None:
        denoiser = inner
    return denoiser


def network_of(denoiser: Denoiser) -> Network:
    """The network inside a teacher, a student or a fake score: pretrained, or the user's own.

    Raises:
        UserError: there is none: it is a closed form.
    """
    network = innermost(denoiser)
    if not isinstance(network, Network):
        raise UserError(
            f"teacher: a {type(network).__name__} has no weights that a pipeline could load; give "
            "a diffusers folder, an EDM file, or a function that returns a Teacher of a Network"
        )
    return network


def unwrap(denoiser: Denoiser) -> Pretrained:
    """The pretrained network inside a teacher, a student or a fake score.

    Raises:
        UserError: there is none: it is a closed form, or the user's own network.
    """
    network = network_of(denoiser)
    if not isinstance(network, Pretrained):
        raise UserError(
            f"teacher: {type(network).__name__} is a network of your own, which no pipeline "
            "loads; give a diffusers folder or an EDM file for this"
        )
    return network


def adapt(teacher: Teacher, adapter: Adapter, name: str) -> AdaptedDenoiser:
    """A new adapter on the teacher's weights, read by the teacher's own schedule."""
    source = network_of(teacher.denoiser)
    if isinstance(source, Pretrained):
        view = with_schedule(source, source.schedule)
        return AdaptedDenoiser(view, name, adapter.config(source.LORA))
    return AdaptedDenoiser(view_of(source), name, config_by_layers(adapter, source))


def config_by_layers(adapter: Adapter, network: Network) -> Any:
    """PEFT's config for a network of the user's own: `targets` names linear layers, convolutions.

    `targets` is matched with whole names, which may begin with "backbone."; None matches all.

    Raises:
        UserError: it matches none, or is no regular expression.
    """
    names = [name.removeprefix("backbone.") for name in adaptable_layers(network)]
    pattern = adapter.targets or ".*"
    try:
        chosen = [n for n in names if any(re.fullmatch(pattern, k) for k in (n, f"backbone.{n}"))]
    except re.error as error:
        raise UserError(
            f"adapters.targets: {quoted(pattern)} is no regular expression ({error}); correct it"
        ) from None
    if not chosen:
        known = f"such as {', '.join(names[:3])}" if names else "and it has none"
        raise UserError(
            f"adapters.targets: {quoted(pattern)} matches no linear layer and no convolution of "
            f"the network, {known}; name other layers"
        )
    exact = "|".join(re.escape(name) for name in chosen)
    return replace(adapter, targets=rf"backbone\.({exact})").config("")


def adaptable_layers(network: Network) -> list[str]:
    """The names of a network's linear layers and convolutions, with adapters or without.

    `nn.MultiheadAttention` reads the weight of the layer inside it and does not call it. A layer
    whose weight is computed from others (weight or spectral norm) could not take up an adapter.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    names, hidden = [], tuple[str, ...]()
    for name, module in network.named_modules():
        if hidden and name.startswith(hidden):
            continue
        layer = base_layer(module)
        if layer is not module or isinstance(module, nn.MultiheadAttention):
            hidden += (f"{name}.",)
        computed = hasattr(layer, "parametrizations") or hasattr(layer, "weight_g")
        if isinstance(layer, kinds) and not computed:
            names.append(name)
    return names


def view_of(network: AnyNetwork) -> AnyNetwork:
    """A network that shares this one's backbone; calls of the two are counted apart."""
    twin = copy(network)
    twin._modules = dict(network._modules)
    twin._forward_pre_hooks = type(network._forward_pre_hooks)()
    return twin


def with_schedule(network: Pretrained, schedule: Schedule) -> Pretrained:
    """A network that shares this one's backbone and reads it by another schedule."""
    return view_of(network).adopt(schedule)


@torch.no_grad()
def merged_backbone(denoiser: Denoiser) -> nn.Module:
    """A new backbone of plain layers, with the student's adapter added to the weights.

    Of a student without an adapter it is the backbone itself.
    """
    backbone: Any = unwrap(denoiser).backbone
    if not isinstance(denoiser, AdaptedDenoiser) or denoiser.name is None:
        return backbone
    plain: dict[str, Tensor] = {}
    for key, value in backbone.state_dict().items():
        if not any(part.startswith(("lora_", "hada_", "lokr_")) for part in key.split(".")):
            plain[key.replace(".base_layer.", ".")] = value
    for key, module in backbone.named_modules():
        if module in adapter_layers(backbone) and denoiser.name in adapter_names(module):
            plain[f"{key}.weight"] = merged_weight(module, denoiser.name)
    twin = type(backbone).from_config(backbone.config)
    weight = next(backbone.parameters())
    twin.to(device=weight.device)
    twin.load_state_dict(plain, assign=True)  # keeps each weight in its own precision
    return twin.eval()


def adapter_of(denoiser: Denoiser) -> AdaptedDenoiser | None:
    """A student's adapter, inside its wrappers; None of a full copy."""
    while isinstance(denoiser, Wrapper):
        denoiser = denoiser.denoiser
    return denoiser if isinstance(denoiser, AdaptedDenoiser) else None


def merged_weight(layer: Any, name: str) -> Tensor:
    """A layer's weight with one adapter added, computed in float32.

    The layer is not changed. Only the layer inside is copied: a copy of all of it has every
    network's adapter, and takes five times as long.
    """
    base = layer.base_layer.weight
    twin = copy(layer)
    twin._modules = dict(layer._modules)
    twin.base_layer = deepcopy(layer.base_layer).float()
    twin.merged_adapters, twin._caches = [], {}
    twin.merge(adapter_names=[name])
    return twin.base_layer.weight.detach().to(base.dtype)
