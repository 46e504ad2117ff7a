"""Tapped blocks: the same tensors as a plain forward hook's, and gradients that do not depend on
checkpointing; a compiled block is refused and never silently left out."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from students.adapter_layers import using
from students.checkpointing import checkpointing
from students.critic import Critic, image_stream
from students.lora import Adapter, adapt
from teachers import UserError, load
from teachers.denoiser import Guided, Network, Reparametrised
from teachers.features import changed, tapped
from teachers.guidance import Interval, SkipLayerGuided
from teachers.process import Karras, Linear
from teachers.reduced.deepcache import DeepCache
from teachers.teacher import Teacher
from tests.helpers import families, families_a, families_b

# One resolution deep, inside what checkpointing runs again, for UNets; each family's middle block.
INNER = {
    "digits": ("backbone.down_blocks.0.resnets.0", "backbone.mid_block"),
    "shapes": ("backbone.down_blocks.1.resnets.0", "backbone.mid_block"),
    "sdxl": ("backbone.down_blocks.0.resnets.0", "backbone.mid_block"),
}
NAMES = [*INNER, *families_a.FAMILIES, *families_b.FAMILIES]


@pytest.fixture
def opened(folders):
    def teacher_of(name: str) -> Teacher:
        if name in ("digits", "shapes"):
            return load(name)
        return load(folders(name), **families.OPTIONS.get(name, {}))

    return teacher_of


def blocks_of(name: str, teacher: Teacher) -> tuple[str, ...]:
    denoiser: Any = teacher.denoiser
    return INNER.get(name) or (denoiser.middle,)


def inputs(teacher: Teacher):
    """x_t, t and the condition of two samples."""
    prompts = [1, 2] if teacher.codec.classes else ["a", "b c"]
    return (
        torch.randn(2, *teacher.shape),
        torch.tensor([0.3, 0.6]),
        teacher.codec.condition(prompts),
    )


def tensors(output) -> list[torch.Tensor]:
    return [o for o in (output if isinstance(output, tuple) else (output,)) if o is not None]


def hooked(network: nn.Module, blocks, *args) -> dict[str, Any]:
    """The outputs that a plain forward hook on each block sees."""
    seen, modules = {}, dict(network.named_modules())
    hooks = [
        modules[name].register_forward_hook(
            lambda module, args, output, name=name: seen.setdefault(name, output)
        )
        for name in blocks
    ]
    network(*args)
    for hook in hooks:
        hook.remove()
    return seen


def hooks_on(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_tap_sees_what_a_plain_hook_sees_and_leaves_no_hook(opened, name):
    teacher = opened(name)
    blocks, point = blocks_of(name, teacher), inputs(teacher)
    expected = hooked(teacher.denoiser, blocks, *point)
    plain = teacher.denoiser(*point)
    before = hooks_on(teacher.denoiser)
    with tapped(teacher.denoiser, blocks) as outputs:
        x = teacher.denoiser(*point)
    assert torch.equal(x, plain)
    assert hooks_on(teacher.denoiser) == before
    with tapped(teacher.denoiser, blocks, stop=True) as stopped:
        teacher.denoiser(*point)
        raise AssertionError("the forward pass went on after the last block")
    for found in (outputs, stopped):
        assert list(found) == list(expected)
        for block in blocks:
            pairs = zip(tensors(found[block]), tensors(expected[block]), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def loss_of(outputs) -> torch.Tensor:
    """A number that depends on each block's image stream, by operations that save tensors."""
    values = [image_stream(o).float().mul(i + 1).tanh() for i, o in enumerate(outputs.values())]
    return torch.stack([v.square().mean() for v in values]).sum()


def gradients(network, blocks, point, stop=False, inside=False) -> list[torch.Tensor]:
    """Of the loss, with respect to x_t and each weight that requires grad.

    Args:
        inside: Whether the backward pass runs before the tap closes.
    """
    x_t, t, cond = point
    x_t = x_t.clone().requires_grad_()
    leaves = [x_t, *(p for p in network.parameters() if p.requires_grad)]
    found = None
    with tapped(network, blocks, stop=stop) as outputs:
        network(x_t, t, cond)
        if inside:
            found = torch.autograd.grad(loss_of(outputs), leaves, allow_unused=True)
    if found is None:
        found = torch.autograd.grad(loss_of(outputs), leaves, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_through_a_tap_do_not_depend_on_checkpointing(opened, name):
    teacher = opened(name)
    blocks, point = blocks_of(name, teacher), inputs(teacher)
    network: Any = teacher.denoiser.requires_grad_(True).train()
    x_t, t, cond = point
    x_t = x_t.clone().requires_grad_()
    leaves = [x_t, *network.parameters()]
    loss = loss_of(hooked(network, blocks, x_t, t, cond))
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    expected = [torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves, strict=True)]
    assert expected[0].abs().max() > 0
    for recompute in (False, True):
        if recompute:
            checkpointing(network.backbone)
        for way in ({}, {"stop": True}, {"inside": True}):
            for got, want in zip(gradients(network, blocks, point, **way), expected, strict=True):
                torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["digits", "sdxl", "pixart-sigma"])
def test_a_tap_follows_the_adapter_in_use_also_when_blocks_run_again(opened, name):
    teacher = opened(name)
    blocks, point = blocks_of(name, teacher), inputs(teacher)
    network: Any = adapt(teacher, Adapter(rank=2), "fake")
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    network.requires_grad_(True)
    expected = gradients(network, blocks, point)
    assert len(expected) > 5 and all(g.abs().max() > 0 for g in expected[:1])
    shared = network.denoiser
    with tapped(network, blocks) as mine, torch.no_grad():
        network(*point)
    with tapped(shared, blocks) as under, torch.no_grad(), using(shared, "fake"):
        shared(*point)
    with tapped(shared, blocks) as base, torch.no_grad(), using(shared, None):
        shared(*point)
    last = blocks[-1]
    assert torch.equal(image_stream(mine[last]), image_stream(under[last]))
    assert not torch.allclose(image_stream(mine[last]), image_stream(base[last]))
    checkpointing(shared.backbone)
    shared.backbone.train()
    for way in ({}, {"stop": True}, {"inside": True}):
        for got, want in zip(gradients(network, blocks, point, **way), expected, strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_wrappers_are_tapped_by_the_names_of_what_they_wrap():
    teacher = load("digits")
    x_t, t, cond = inputs(teacher)
    name, network = "backbone.mid_block", teacher.denoiser
    clocked = Reparametrised(network, Linear())
    for wrapper in (clocked, Guided(clocked, 3.0, teacher.codec.null), Interval(
        Guided(network, 3.0, teacher.codec.null), 0.0, 100.0
    )):  # fmt: skip
        (expected,) = hooked(wrapper, [within(wrapper, network, name)], x_t, t, cond).values()
        for spelling in (name, within(wrapper, network, name)):
            with tapped(wrapper, [spelling]) as outputs:
                wrapper(x_t, t, cond)
            assert torch.equal(outputs[spelling], expected)
    assert len(expected) == 4  # both halves of guidance, the condition's first


def within(wrapper: nn.Module, network: nn.Module, name: str) -> str:
    """A block's name as the wrapper's named_modules() gives it."""
    block = dict(network.named_modules())[name]
    return next(n for n, m in wrapper.named_modules() if m is block)


# ---- torch.compile


OUTER = ("", "backbone", "backbone.mid_block")  # at or above the tapped block


NAME = "backbone.mid_block"


def users_of(network: Any, teacher: Teacher) -> dict[str, Any]:
    """What hooks on blocks serve, as calls that place them."""
    critic = Critic(network, teacher.shape, teacher.codec.condition([1]), [NAME])
    skipping = SkipLayerGuided(network, 2.0, [f"{NAME}.resnets.0"])
    return {
        "tapped": lambda: tapped(network, [NAME]).__enter__(),
        "changed": lambda: changed(network, [NAME], lambda *_: None).__enter__(),
        "critic": lambda: critic(*inputs(teacher)),
        "skip": lambda: skipping(*inputs(teacher)),
    }


def check_refused(call) -> None:
    line = r"^[\w. ]+: '.*' is in a compiled module, which runs no hooks; compile the blocks below"
    with pytest.raises(UserError, match=line) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("outer", OUTER)
def test_a_block_in_a_module_that_compiled_itself_is_refused_in_one_line(outer):
    teacher = load("digits")
    network: Any = deepcopy(teacher.denoiser)
    calls = users_of(network, teacher)
    network.get_submodule(outer).compile(backend="eager")
    if outer:
        calls["DeepCache"] = lambda: DeepCache(network.backbone, 2)
    for call in calls.values():
        check_refused(call)


@pytest.mark.parametrize("outer", OUTER)
def test_so_is_one_in_a_module_that_torch_compile_wraps(outer):
    teacher = load("digits")
    network: Any = deepcopy(teacher.denoiser)
    calls = users_of(network, teacher)
    compiled: Any = torch.compile(network.get_submodule(outer), backend="eager")
    if outer:
        parent, _, leaf = outer.rpartition(".")
        setattr(network.get_submodule(parent), leaf, compiled)
    else:
        calls = {"tapped": lambda: tapped(compiled, [NAME]).__enter__()}
    for call in calls.values():
        check_refused(call)


@torch.no_grad()
def test_blocks_compiled_below_a_tap_do_not_disturb_it():
    teacher = load("digits")
    network: Any = teacher.denoiser
    point, name = inputs(teacher), "backbone.mid_block"
    with tapped(network, [name]) as expected:
        network(*point)
    for resnet in network.backbone.mid_block.resnets:
        resnet.compile(backend="eager")
    with tapped(network, [name]) as outputs:
        network(*point)
    torch.testing.assert_close(outputs, expected)


@torch.no_grad()
def test_a_function_compiled_around_the_network_is_refused_where_it_runs_no_hooks():
    """No module shows that it is compiled; the missing output does."""
    network: Any = load("digits").denoiser
    point, name = inputs(load("digits")), "backbone.mid_block"
    compiled = torch.compile(lambda *args: network(*args), backend="eager")
    compiled(*point)  # compiled before there was a hook, and not again because of one
    with pytest.raises(UserError, match="ran no hook"), tapped(network, [name]):
        compiled(*point)


# ---- names, and blocks that do not run


class Two(nn.Module):
    """Two layers, of which the forward pass runs one, twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x_t, t):
        return self.first(self.first(x_t))


@pytest.mark.parametrize(
    ("name", "near"),
    [("backbone.frist", "did you mean 'backbone.first'"), ("", "known: backbone"),
     ("backbone.first.", "did you mean 'backbone.first'"), ("first", "known: backbone")],
)  # fmt: skip
def test_a_name_that_is_not_there_is_refused_with_the_nearest(name, near):
    network = Guided(Network(Two(), Karras(), "x"), 2.0)
    with (
        pytest.raises(UserError, match=f"^blocks: the network has no block '{name}'; {near}"),
        tapped(network, [name]),
    ):
        pass


def test_of_a_block_that_runs_twice_the_first_output_is_kept():
    network, x_t = Network(Two(), Karras(), "x"), torch.randn(2, 3)
    with tapped(network, ["backbone.first"]) as outputs:
        network(x_t, torch.rand(2))
    assert torch.equal(outputs["backbone.first"], network.backbone.first(x_t))


def test_a_block_that_does_not_run_is_refused():
    network, x_t, t = Network(Two(), Karras(), "x"), torch.randn(2, 3), torch.rand(2)
    with (
        pytest.raises(UserError, match=r"block 'backbone\.second' ran no hook"),
        tapped(network, ["backbone.first", "backbone.second"]),
    ):
        network(x_t, t)
    with pytest.raises(UserError, match=r"block 'backbone\.second' ran no hook"):
        SkipLayerGuided(network, 2.0, ["backbone.second"])(x_t, t)
    with pytest.raises(UserError, match=r"critic\.blocks: block 'backbone\.second' ran no hook"):
        Critic(network, (3,), None, ["backbone.second"])


def test_an_error_of_the_network_is_the_one_that_is_seen():
    network = Network(Two(), Karras(), "x")
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        tapped(network, ["backbone.first"]),
    ):
        network(torch.randn(2, 4), torch.rand(2))
    assert hooks_on(network) == 0
