"""Bytes and FLOPs of a pass, against torch's own counter and against closed forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from distill.profiling import FusedAttention, Meter

WAVES = 4  # sines in a block, each of which keeps its input for the backward pass


class Waves(nn.Module):
    def forward(self, x):
        for _ in range(WAVES):
            x = x.sin()
        return x


def chain(x, blocks, again):
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if again else block(x)
    return x


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_flops_are_those_of_torchs_own_counter(again):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    head = nn.Linear(4 * 4 * 4, 5)

    def step(x):
        with torch.no_grad():
            net(x)
        features = chain(x, net, again)
        (head(features) @ features[:5, :5]).square().mean().backward()

    x = torch.randn(6, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        step(x)
    with Meter(set()) as meter:
        step(x)
    assert meter.flops == counter.get_total_flops() > 0


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_fused_attentions_flops_are_those_of_torchs_own_counter(again):
    q = torch.randn(2, 3, 7, 8, requires_grad=True)
    k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(2))

    def step():
        def attend(*x):
            return F.scaled_dot_product_attention(*x).sin()

        with torch.no_grad():
            attend(q, k, v)
        out = checkpoint(attend, q, k, v, use_reentrant=False) if again else attend(q, k, v)
        out.sum().backward()

    with Meter(set()) as meter, FusedAttention(meter):
        step()
    # torch's own formulas, which its counter applies to the kernels of GPUs alone
    forward = sdpa_flop_count(q.shape, k.shape, v.shape)
    backward = sdpa_backward_flop_count((2, 3, 7, 8), q.shape, k.shape, v.shape)
    assert meter.flops == (2 + again) * forward + backward > 0


@pytest.mark.parametrize("depth", [8, 32])
def test_checkpointing_keeps_each_blocks_input_and_one_block_recomputed(depth):
    x = torch.randn(1000, requires_grad=True)
    most = []
    for again in (False, True):
        with Meter({x.untyped_storage()._cdata}) as meter:
            chain(x, [Waves() for _ in range(depth)], again).sum().backward()
        most.append(meter.most // x.nbytes)
    # x is known; of the last sine, a cosine and its product with the gradient but no output
    assert most == [depth * WAVES - 1 + 2, depth - 1 + WAVES - 1 + 2]
