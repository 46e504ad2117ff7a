"""DeepCache: whole calls are the network's own, shallow ones a forward written out by hand."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from distill.evaluation.subject import baseline_of
from students.architecture.units import check_units, units
from teachers.reduced.deepcache import DeepCache, deep_part
from tests.helpers.refusals import refused

LEVELS = (32, 32, 64)


def plain(down=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), resnets=1):
    """Three levels of pixels."""
    torch.manual_seed(0)
    up = [k.replace("Down", "Up") for k in reversed(down)]
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, down_block_types=down, up_block_types=up,
        block_out_channels=LEVELS[: len(down)], layers_per_block=resnets, norm_num_groups=8,
        attention_head_dim=8,
    ).eval()  # fmt: skip


def conditional():
    """Two levels that read text, and one that does not."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=LEVELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2, norm_num_groups=8, cross_attention_dim=16, attention_head_dim=8,
    ).eval()  # fmt: skip


def inputs(network, seed, size=8):
    torch.manual_seed(seed)
    x, t = torch.randn(2, network.config.in_channels, size, size), torch.tensor([10.0, 300.0])
    text = [torch.randn(2, 5, 16)] if isinstance(network, UNet2DConditionModel) else []
    return x, t, *text


def by_hand(network, kept, x, t, text=None):
    """The outermost level alone, with `kept` where it reads what comes up from below."""
    emb = network.time_embedding(network.time_proj(t))
    down, up = network.down_blocks[0], network.up_blocks[-1]
    x = network.conv_in(x)
    skips = [x]
    for i, resnet in enumerate(down.resnets):
        x = resnet(x, emb)
        if text is not None:
            x = down.attentions[i](x, encoder_hidden_states=text, return_dict=False)[0]
        skips.append(x)
    x = kept
    for i, resnet in enumerate(up.resnets):
        x = resnet(torch.cat([x, skips.pop()], 1), emb)
        if text is not None:
            x = up.attentions[i](x, encoder_hidden_states=text, return_dict=False)[0]
    return network.conv_out(network.conv_act(network.conv_norm_out(x)))


KINDS = {"pixels": plain, "two resnets": lambda: plain(resnets=2), "text": conditional}


@pytest.fixture(params=KINDS)
def network(request):
    return KINDS[request.param]()


@torch.no_grad()
def test_with_an_interval_of_one_every_call_is_the_networks_own(network):
    some = [inputs(network, seed) for seed in range(3)]
    want = [network(*v).sample for v in some]
    with DeepCache(network, 1) as kept:
        found = [network(*v).sample for v in some]
    assert all(map(torch.equal, found, want))
    assert (kept.whole, kept.shallow) == (6, 0)


@torch.no_grad()
def test_a_shallow_call_reads_what_the_whole_one_before_it_kept(network):
    inner = []
    hook = network.up_blocks[-2].register_forward_hook(lambda *a: inner.append(a[2]))
    some = [inputs(network, seed) for seed in range(5)]
    wholes = [network(*v).sample for v in some]
    hook.remove()
    with DeepCache(network, 3) as kept:
        found = [network(*v).sample for v in some]
    assert torch.equal(found[0], wholes[0]) and torch.equal(found[3], wholes[3])
    for i, before in ((1, 0), (2, 0), (4, 3)):
        torch.testing.assert_close(found[i], by_hand(network, inner[before], *some[i]))
        assert not torch.allclose(found[i], wholes[i], atol=1e-3)
    assert (kept.whole, kept.shallow) == (4, 6)


@torch.no_grad()
def test_a_shallow_call_runs_nothing_of_the_inner_levels(network):
    ran = []
    deep = [network.mid_block, *network.down_blocks[1:], *network.up_blocks[:-1]]
    deep += list(network.down_blocks[0].downsamplers)
    convolutions = [m for b in deep for m in b.modules() if isinstance(m, nn.Conv2d)]
    for m in convolutions:
        m.register_forward_hook(lambda *_: ran.append(1))
    with DeepCache(network, 2):
        network(*inputs(network, 0))
        assert len(ran) == len(convolutions)
        ran.clear()
        network(*inputs(network, 1))
        assert not ran


@torch.no_grad()
def test_the_network_is_what_it_was_afterwards_and_after_an_error(network):
    before, some = network(*inputs(network, 0)).sample, inputs(network, 0)
    with pytest.raises(RuntimeError), DeepCache(network, 2):
        network(*some)
        network(torch.randn(2, 7, 8, 8), *some[1:])  # a shallow call that fails
    assert torch.equal(network(*some).sample, before)
    assert all("forward" not in vars(m) and not m._forward_hooks for m in network.modules())
    kept = DeepCache(network, 2)
    for seed in (0, 1):  # the first call of each walk is whole
        with kept:
            network(*inputs(network, seed, 8 + 8 * seed))
    assert (kept.whole, kept.shallow) == (4, 0)


def test_networks_without_a_level_to_keep_are_refused():
    with refused("cache", "Linear", "UNet"):
        deep_part(nn.Linear(2, 2))
    with refused("cache", "nothing"):
        deep_part(plain(down=("DownBlock2D",)))
    with refused("cache", "SkipDownBlock2D"):
        deep_part(plain(down=("SkipDownBlock2D", "DownBlock2D")))


# single layers that inherit


def residual(network):
    """Two of a network's residual layers, one after the other where it has an attention there."""
    names = [*units(network)]
    return [names[0], names[-1]]


@torch.no_grad()
def test_with_an_interval_of_one_no_layer_inherits(network):
    some = [inputs(network, seed) for seed in range(3)]
    want = [network(*v).sample for v in some]
    with DeepCache(network, 1, residual(network)) as kept:
        found = [network(*v).sample for v in some]
    assert all(map(torch.equal, found, want)) and kept.shallow == 0


@torch.no_grad()
def test_a_layer_adds_in_a_shallow_call_what_it_added_in_the_whole_one(network):
    """By hand, with hooks that put input + (output - input of the first call) in its place."""
    chosen, some = residual(network), [inputs(network, seed) for seed in range(2)]
    added, ran = {}, []

    def record(name):
        def hook(module, args, kwargs, output):
            added[name] = (output[0] if isinstance(output, tuple) else output) - args[0]

        return hook

    def put(name):
        def hook(module, args, kwargs, output):
            out = args[0] + added[name]
            return (out,) if isinstance(output, tuple) else out

        return hook

    want = []
    for make, v in zip((record, put), some, strict=True):
        hooks = [network.get_submodule(n).register_forward_hook(make(n), with_kwargs=True)
                 for n in chosen]  # fmt: skip
        want.append(network(*v).sample)
        for hook in hooks:
            hook.remove()
    whole = network(*some[1]).sample
    for name in chosen:
        for m in network.get_submodule(name).modules():
            m.register_forward_hook(lambda *_: ran.append(1)) if isinstance(m, nn.Linear) else None
    with DeepCache(network, 2, units=chosen) as kept:
        found = [network(*v).sample for v in some[:1]]
        ran.clear()
        found.append(network(*some[1]).sample)
    assert not ran and (kept.whole, kept.shallow) == (2, 2)
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])
    assert not torch.allclose(found[1], whole, atol=1e-3)
    assert torch.equal(network(*some[1]).sample, whole)


def test_a_layer_that_cannot_inherit_is_refused():
    with refused("inherit", "'mid_block'", "no layer that can go"):
        check_units(plain(), ["mid_block"], "inherit")
    with refused("eval", "cache: 2 or more with inherit"):
        baseline_of({"solver": "ddim", "inherit": ["mid_block.resnets.0"]})
