"""Derivatives along a direction: closed forms, and central differences for every family."""

import pytest
import torch
from torch import nn

from distill.objectives.tangent import tangent
from distill.profiling import Meter, evaluations_of
from students.checkpointing import checkpointing
from students.lora import Adapter, unwrap
from students.schedulers import student
from teachers import load
from teachers.edm import edm2
from tests.helpers import families
from tests.helpers.disturbed import disturbed

WAYS = {"forward": 1e-12, "difference": 3e-4, "stacked": 3e-4, "central": 1e-8}


@pytest.mark.parametrize("how", WAYS)
def test_the_derivative_of_a_product_is_by_hand(how):
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    t = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    dx, dt = torch.ones_like(x), -torch.ones_like(t)
    value, slope = tangent(lambda x, t: x**2 * t, (x, t), (dx, dt), how, step=1e-5)
    assert torch.equal(value, x**2 * t)
    torch.testing.assert_close(slope, 2 * x * t - x**2, atol=WAYS[how], rtol=0)


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="one for each primal"):
        tangent(lambda x: x, (torch.zeros(2),), (torch.zeros(3),))


def test_neither_the_value_nor_the_slope_holds_a_graph():
    layer = nn.Linear(2, 2)
    for how in WAYS:
        found = tangent(layer, (torch.ones(1, 2),), (torch.ones(1, 2),), how)
        assert not any(v.requires_grad for v in found)


@pytest.mark.parametrize("how", WAYS)
def test_a_value_with_a_graph_has_the_gradient_of_a_plain_call(how):
    layer = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    x, v = torch.randn(2, 3, 2, dtype=torch.float64)
    value, slope = tangent(layer, (x,), (v,), how, step=1e-6, graph=True)
    assert len(calls) == {"difference": 2, "central": 3}.get(how, 1)
    assert value.requires_grad and not slope.requires_grad
    torch.testing.assert_close(slope, torch.func.jvp(layer, (x,), (v,))[1], atol=1e-4, rtol=1e-4)
    found = torch.autograd.grad(value.square().sum(), list(layer.parameters()))
    wanted = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(found, wanted)


def test_a_value_with_a_graph_keeps_no_more_than_a_plain_calls():
    layer = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.SiLU()) for _ in range(4)])
    x, v = torch.randn(2, 64, 32)
    known = {p.untyped_storage()._cdata for p in (*layer.parameters(), x, v)}
    with Meter(set(known)) as plain:
        y = layer(x)
        kept = plain.now
    with Meter(set(known)) as meter:
        value, slope = tangent(layer, (x,), (v,), graph=True)
        assert meter.now <= kept + 2 * slope.numel() * 4  # the derivative itself
    torch.testing.assert_close(value, y)


def test_a_derivative_counts_as_two_evaluations():
    layer, x = nn.Linear(2, 2), torch.ones(3, 2)
    for graph in (False, True):
        with evaluations_of({"layer": [layer]}) as counts:
            layer(x)
            tangent(layer, (x,), (x,), graph=graph)
        assert counts["layer"] == 3 + 2 * 3


def test_attention_and_autocast_do_not_stop_forward_mode():
    q = torch.randn(2, 4, 3, 8)

    def attend(q):
        return nn.functional.scaled_dot_product_attention(q, q, q)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, slope = tangent(attend, (q,), (torch.ones_like(q),))
    assert value.dtype == slope.dtype == torch.float32
    close = tangent(attend, (q.double(),), (torch.ones_like(q).double(),), "difference", 1e-6)
    torch.testing.assert_close(slope.double(), close[1], atol=1e-4, rtol=1e-3)


def double(teacher, adapter=None):
    """A student's network in float64, and its condition of two samples."""
    made = disturbed(student(teacher, 2, None, True, adapter)).double()
    prompts = [0, 1] if getattr(teacher.codec, "classes", 0) else ["a cat", "two dogs"]
    cond = teacher.codec.condition(prompts)
    return made.denoiser, cond and {
        k: v.double() if v.is_floating_point() else v for k, v in cond.items()
    }


@pytest.mark.parametrize("adapter", [None, Adapter(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["digits", "shapes", *families.FAMILIES])
def test_forward_mode_is_the_central_difference_for_every_family(folders, name, adapter):
    embedded = name in ("digits", "shapes")
    source = name if embedded else folders(name)
    teacher = load(source, **families.OPTIONS.get(name, {}))
    denoiser, cond = double(teacher, adapter)
    torch.manual_seed(0)
    x, v = torch.randn(2, 2, *teacher.shape, dtype=torch.float64)
    # between two of a thousand times, where tables have no kink
    t, u = torch.tensor([[0.6004, 0.3003], [0.1, -0.2]], dtype=torch.float64)

    def f(x, t):
        return denoiser(x, t, cond)

    value, slope = tangent(f, (x, t), (v, u))
    with_graph = tangent(f, (x, t), (v, u), graph=True)
    close = {"atol": 1e-4, "rtol": 1e-4}  # adapters without gradients add in single precision
    torch.testing.assert_close(with_graph[1], slope, **close)
    torch.testing.assert_close(with_graph[0].detach(), value, **close)
    h = 2e-4  # no less: times are embedded in single precision, whatever the weights are
    with torch.no_grad():
        torch.testing.assert_close(value, f(x, t), atol=1e-4, rtol=1e-4)
        want = (f(x + h * v, t + h * u) - f(x - h * v, t - h * u)) / (2 * h)
    scale = want.square().mean().sqrt()
    gap = ((slope - want).square().mean().sqrt() / scale).item()
    assert gap < 1e-2


@pytest.mark.parametrize("adapter", [None, Adapter(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["digits", "sana"])
def test_activation_checkpointing_recomputes_the_value_alone(folders, name, adapter):
    teacher = load(name if name == "digits" else folders(name))
    denoiser, cond = double(teacher, adapter)
    torch.manual_seed(0)
    x, v = torch.randn(2, 2, *teacher.shape, dtype=torch.float64)
    t, u = torch.tensor([[0.6004, 0.3003], [0.1, -0.2]], dtype=torch.float64)
    weights = list(denoiser.parameters())
    for p in weights:
        p.requires_grad_(True)

    def found():
        value, slope = tangent(lambda x, t: denoiser(x, t, cond), (x, t), (v, u), graph=True)
        return value, slope, torch.autograd.grad(value.square().sum(), weights, allow_unused=True)

    plain = found()
    backbone = unwrap(denoiser).backbone
    blocks = []
    checkpointing(backbone)
    for block in backbone.modules():
        if type(block).__name__ in ("ResnetBlock2D", "SanaTransformerBlock"):
            block.register_forward_hook(lambda *_: blocks.append(1))
    again = found()
    assert blocks  # each ran once with its hooks, and again without them
    for a, b in zip((*plain[:2], *plain[2]), (*again[:2], *again[2]), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("graph", [False, True])
def test_forward_mode_goes_through_edm2s_normalised_weights(graph):
    torch.manual_seed(0)
    network = edm2.UNet(
        img_resolution=8, img_channels=2, label_dim=3, model_channels=16, channel_mult=(1, 2),
        num_blocks=1, attn_resolutions=(4,), channels_per_head=8,
    )  # fmt: skip
    with torch.no_grad():
        for p in network.parameters():  # gains start at 0
            p.add_(0.1 * torch.randn_like(p))
    network.double()
    x, v = torch.randn(2, 2, 2, 8, 8, dtype=torch.float64)
    t, u = torch.tensor([[0.3, -0.5], [0.2, 0.4]], dtype=torch.float64)
    labels = torch.tensor([0, 2])

    def f(x, t):
        return network(x, t, labels)

    value, slope = tangent(f, (x, t), (v, u), graph=graph)
    with torch.no_grad():
        torch.testing.assert_close(value.detach(), f(x, t))
        want = (f(x + 1e-5 * v, t + 1e-5 * u) - f(x - 1e-5 * v, t - 1e-5 * u)) / 2e-5
    assert want.abs().max() > 1e-3 and value.requires_grad == graph
    torch.testing.assert_close(slope, want, atol=1e-8, rtol=1e-8)
