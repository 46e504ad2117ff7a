"""Hooks on the blocks of a network: read a block's output, or put another output in its place.

A critic reads features, skip-layer guidance skips blocks and DeepCache keeps the output of one; all
three use this module. Source: PyTorch's forward hooks; what goes wrong with them under
`torch.compile` and under activation checkpointing is handled here, once.

Hooks run at eager module boundaries. A module that is compiled as a whole does not run the hooks
of the modules inside it, and PyTorch gives no sign of it. Modules that `teachers/compiled.py` has
compiled run eagerly while something inside them is hooked, and run the hooks on themselves. A block
that `torch.compile` or `module.compile()` has compiled, or a module around it, is refused by
`blocks_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import nn

from teachers.compiled import eagerly
from teachers.denoiser import Denoiser
from teachers.errors import UserError, nearest

# block, positional arguments, keyword arguments, output -> None, or the output to use instead
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


_HOOKED: list[nn.Module] = []


class _Complete(Exception):
    """Every tapped block has run, so the rest of the forward pass is not needed."""


@contextmanager
def tapped(
    denoiser: nn.Module, blocks: Sequence[str], key: str = "blocks", stop: bool = False
) -> Iterator[dict[str, Any]]:
    """Record the outputs of named blocks while the denoiser runs in this context.

        with tapped(denoiser, ["backbone.mid_block"]) as outputs:
            denoiser(x_t, t, cond)
        outputs["backbone.mid_block"]  # (B, C, H, W) of a UNet, (B, N, C) of most transformers

    The dict is filled in the order in which the blocks run. It holds what each block returned, with
    its graph, at the block's first call: `Guided` runs both halves as one call of 2B rows, the
    condition's first. Blocks that activation checkpointing runs again during the backward pass
    record nothing.

    Args:
        denoiser: The network, or a wrapper or adapter around it.
        blocks: Names as the network's `named_modules()` gives them; names below a wrapper may also
            be given as the wrapper's `named_modules()` gives them.
        key: The recipe key that names the blocks, which begins error messages.
        stop: End the forward pass as soon as all blocks have run. The denoiser's call then raises
            an exception that this context catches, so nothing after it in the context runs.

    Raises:
        UserError: there is no such block, it is compiled or lies in a compiled module, or it did
            not run.
    """
    outputs: dict[str, Any] = {}
    modules = blocks_of(denoiser, blocks, key)

    def record(name: str) -> Hook:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any):
            if name in outputs:
                return
            outputs[name] = output
            if stop and len(outputs) == len(modules):
                raise _Complete

        return hook

    with suppress(_Complete), ExitStack() as hooks:
        hooks.enter_context(eagerly(modules_around(denoiser, blocks)))
        for name, module in modules.items():
            hooks.enter_context(hooked(module, record(name)))
        yield outputs
    check_ran(blocks, outputs, key)


@contextmanager
def changed(
    denoiser: nn.Module, blocks: Sequence[str], change: Hook, key: str = "blocks"
) -> Iterator[None]:
    """Put `change(block, args, kwargs, output)` in place of the output of each named block.

    The blocks still run. Leave the context after the backward pass where the network is
    checkpointed: blocks that run again outside of it return their own output.

    Args:
        denoiser, blocks, key: As for `tapped`.

    Raises:
        UserError: as for `tapped`.
    """
    ran: set[str] = set()

    def replace(name: str) -> Hook:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any):
            ran.add(name)
            return change(block, args, kwargs, output)

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(eagerly(modules_around(denoiser, blocks)))
        for name, module in blocks_of(denoiser, blocks, key).items():
            hooks.enter_context(hooked(module, replace(name)))
        yield
    check_ran(blocks, ran, key)


def hooked_modules() -> list[nn.Module]:
    """The modules that have hooks of this file now."""
    return _HOOKED


@contextmanager
def hooked(
    block: nn.Module,
    after: Hook,
    before: Callable[[nn.Module, tuple[Any, ...]], Any] | None = None,
    always: bool = False,
) -> Iterator[None]:
    """Call `before` and `after` around each call of one module.

    Args:
        before: What it returns, if anything, takes the place of the positional arguments.
        always: Call `after` also when the module raises an exception.
    """
    with ExitStack() as hooks:
        _HOOKED.append(block)
        hooks.callback(_HOOKED.remove, block)
        if before is not None:
            hooks.callback(block.register_forward_pre_hook(before).remove)
        hook = block.register_forward_hook(after, with_kwargs=True, always_call=always)
        hooks.callback(hook.remove)
        yield


@contextmanager
def replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run `forward` in place of the module's own `forward`, which then costs nothing."""
    before = vars(block).get("forward")  # an instance attribute of someone else's
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


def blocks_of(network: nn.Module, blocks: Sequence[str], key: str) -> dict[str, nn.Module]:
    """The named blocks of a denoiser or another network, all of which run hooks.

    Raises:
        UserError: one of them is missing, compiled, or inside a compiled module.
    """
    modules = {}
    for name in blocks:
        path = _path(network, name)
        if path is None:
            raise UserError(
                f"{key}: the network has no block {name!r}; {nearest(name, block_names(network))}"
            )
        if any(map(is_compiled, path)):
            raise UserError(
                f"{key}: {name!r} is in a compiled module, which runs no hooks; compile the blocks "
                "below it instead, for example with diffusers' compile_repeated_blocks"
            )
        modules[name] = path[-1]
    return modules


def modules_around(network: nn.Module, blocks: Sequence[str]) -> list[nn.Module]:
    """The modules of a network that hold one of the named blocks, wrappers included."""
    paths = (_path(network, name) or [] for name in blocks)
    return [module for path in paths for module in path[:-1]]


def check_ran(blocks: Sequence[str], ran: Sequence[str] | set[str] | dict[str, Any], key: str):
    """Refuse a block that did not run: its hook had no effect.

    Raises:
        UserError: naming the block.
    """
    if missing := [name for name in blocks if name not in ran]:
        raise UserError(
            f"{key}: block {missing[0]!r} ran no hook in the forward pass; name a block that every "
            "forward pass calls, and compile no function around the network"
        )


def block_names(network: nn.Module) -> list[str]:
    """Names of the network's modules down to three levels, without its wrappers' prefixes."""
    while (below := _below(network)) is not None:
        network = below
    return [n for n, _ in network.named_modules() if n and n.count(".") <= 2]


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of this module run compiled code: by `module.compile()` or `torch.compile`."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _path(network: nn.Module, name: str) -> list[nn.Module] | None:
    """The modules from `network` down to the named block, both included; None if it is missing."""
    above: list[nn.Module] = []
    module: nn.Module | None = network
    while name and module is not None:
        if (path := _walk(module, name)) is not None:
            return [*above, *path]
        above.append(module)
        module = _below(module)
    return None


def _walk(root: nn.Module, name: str) -> list[nn.Module] | None:
    """The modules along a dotted name, also through the wrappers that `torch.compile` adds."""
    path = [root]
    for part in name.split("."):
        compiled = path[-1]._modules.get("_orig_mod")
        if compiled is not None and part not in path[-1]._modules:
            path.append(compiled)
        child = path[-1]._modules.get(part)
        if child is None:
            return None
        path.append(child)
    return path


def _below(module: nn.Module) -> nn.Module | None:
    """What a wrapper, an adapter or `torch.compile` wraps; None where it is the network itself."""
    if (wrapped := module._modules.get("_orig_mod")) is not None:
        return wrapped
    return module.inner_denoiser if isinstance(module, Denoiser) else None
