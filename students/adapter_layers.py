"""The layers of a network with adapters: which adapter they run with, and what they compute.

PEFT's `set_adapter` is never called: it also changes requires_grad, and autograd then silently
drops gradients of a graph that is already built. `using` selects the adapter of a forward pass. All
layers of a network read the selection from one shared object, so that selecting costs the same for
5 layers and for 5,000.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_LAYERS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()  # with adapters, by module
_PARAMETERS: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()
_CLASSES: dict[type, type] = {}  # PEFT's layer classes, and their subclasses that read a Selection


class Selection:
    """The adapter that the layers of a network run with; one object for all of them.

    name: The adapter's name; None is the base weights.
    """

    def __init__(self) -> None:
        self.name: str | None = None


class SelectingLayer:
    """Mixin of PEFT's layer classes: the active adapter is that of a shared `Selection`.

    PEFT sets these two attributes when adapters are created or merged. Its values are ignored,
    because every forward pass runs inside `using`.
    """

    _selection: Selection

    @property
    def _active_adapter(self) -> list[str]:
        return [] if self._selection.name is None else [self._selection.name]

    @_active_adapter.setter
    def _active_adapter(self, value: Any) -> None:
        pass

    @property
    def _disable_adapters(self) -> bool:
        return self._selection.name is None

    @_disable_adapters.setter
    def _disable_adapters(self, value: bool) -> None:
        pass

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, with the change of the selected adapter, in the base layer's type.

        PEFT converts x to float32 where the adapter is float32, and multiplies in float32 where
        autocast is off. Here the weights of a plain LoRA are converted to x's type instead: they
        are far smaller than x, and the products run as fast as the base layer's. Other kinds of
        adapters run PEFT's own code, under autocast in x's type.
        """
        layer: Any = self
        name = self._selection.name
        if name is None:
            return layer.base_layer(x, *args, **kwargs)
        if not is_plain_lora(layer, name):
            with autocast_in(x):
                return super().forward(x, *args, **kwargs)  # pyright: ignore
        out = layer.base_layer(x, *args, **kwargs)
        change = product(layer.lora_B[name], product(layer.lora_A[name], x))
        scale = layer.scaling[name]
        return (out + (change if scale == 1 else change * scale)).to(out.dtype)


def is_plain_lora(layer: Any, name: str) -> bool:
    """Whether a layer's adapter is two products and nothing else: no DoRA, bias or dropout."""
    if name not in getattr(layer, "lora_A", ()) or name in layer.lora_variant:
        return False
    plain = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(layer.lora_A[name], plain) and isinstance(
        layer.lora_dropout[name], nn.Identity
    )


def product(layer: Any, x: Tensor) -> Tensor:
    """The output of a linear layer or a convolution, its weights converted to x's type."""
    weight = layer.weight.to(x.dtype)
    bias = layer.bias if layer.bias is None else layer.bias.to(x.dtype)
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)


def autocast_in(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast in x's type where that is 16 bits and autocast is off; else nothing changes."""
    kind = x.device.type
    if x.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled(kind):
        return torch.autocast(kind, x.dtype, cache_enabled=False)
    return nullcontext()


def share_selection(layers: list[Any]) -> None:
    """Make the layers read one `Selection`: that of the layers which have one, or a new one."""
    shared = (
        next((m._selection for m in layers if isinstance(m, SelectingLayer)), None) or Selection()
    )
    for layer in layers:
        if isinstance(layer, SelectingLayer):
            continue
        kind = type(layer)
        if kind not in _CLASSES:
            _CLASSES[kind] = type(
                kind.__name__, (SelectingLayer, kind), {"__module__": kind.__module__}
            )
        vars(layer).pop("_active_adapter", None)
        vars(layer).pop("_disable_adapters", None)
        layer._selection, layer.__class__ = shared, _CLASSES[kind]


def adapter_layers(module: nn.Module) -> list[Any]:
    """The layers in `module` that have adapters; looked up once, until `forget_layers`."""
    if module not in _LAYERS:
        from peft.tuners.tuners_utils import BaseTunerLayer

        _LAYERS[module] = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    return _LAYERS[module]


def adapter_names(layer: Any) -> set[str]:
    """The names of a layer's adapters."""
    return {k for n in layer.adapter_layer_names if n in vars(layer)["_modules"]
            or n in vars(layer)["_parameters"] for k in getattr(layer, n)}  # fmt: skip


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """The module's weights, adapters' included; looked up once, until `forget_layers`."""
    if module not in _PARAMETERS:
        _PARAMETERS[module] = list(module.parameters())
    return _PARAMETERS[module]


def forget_layers() -> None:
    """Look layers and weights up again, since a module has been given new adapters."""
    _LAYERS.clear()
    _PARAMETERS.clear()


@contextmanager
def using(module: nn.Module, name: str | None) -> Iterator[None]:
    """Run `module` with one adapter (None: without); requires_grad never changes."""
    selection = selection_of(module)
    before, selection.name = selection.name, name
    try:
        yield
    finally:
        selection.name = before


def selection_of(module: nn.Module) -> Selection:
    """The selection that the layers of `module` read; an unused one if it has no adapters."""
    layers = adapter_layers(module)
    return layers[0]._selection if layers else Selection()


def active_adapter(module: nn.Module) -> str | None:
    """The adapter that `module` now runs with; None is none."""
    return selection_of(module).name


def base_layer(layer: nn.Module) -> nn.Module:
    """The layer that an adapter's layer wraps; of a plain layer, the layer itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
