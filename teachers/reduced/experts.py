"""Convolutions whose weights are mixed for each sample: conditional convolutions.

A-SDM, 2024 (arXiv:2406.00210), makes up for layers that went by several expert kernels for each
convolution, all of which begin as the teacher's, mixed by a router that reads the input (CondConv,
arXiv:1904.04971). The router and the number of experts are not stated; here it is a softmax of a
linear layer of the input's mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Experts(nn.Module):
    """A convolution (B, C, H, W) to (B, D, H', W') with weights Σ_k α_k W_k of each sample.

    Args:
        like: The convolution that all experts begin as.
        count: K, how many there are.
    """

    def __init__(self, like: nn.Conv2d, count: int) -> None:
        super().__init__()
        self.stride, self.padding = like.stride, like.padding
        self.dilation, self.groups = like.dilation, like.groups
        self.router = nn.Linear(like.in_channels, count).to(like.weight)
        self.weight = nn.Parameter(torch.stack([like.weight.detach()] * count))  # (K, D, C, k, k)
        bias = None if like.bias is None else torch.stack([like.bias.detach()] * count)
        self.bias = None if bias is None else nn.Parameter(bias)  # (K, D)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shares = self.router(x.mean((2, 3))).softmax(-1)  # (B, K)
        weight = torch.einsum("bk,kdcij->bdcij", shares, self.weight)
        b, d = weight.shape[:2]
        # one convolution whose groups are the samples
        groups = b * self.groups
        flat = x.reshape(1, -1, *x.shape[2:])
        settings: Any = (None, self.stride, self.padding, self.dilation, groups)
        out = F.conv2d(flat, weight.flatten(0, 1), *settings)
        out = out.reshape(b, d, *out.shape[2:])
        return out if self.bias is None else out + (shares @ self.bias)[:, :, None, None]


def experts(layer: nn.Conv2d, count: int = 3) -> Experts:
    """The convolution as several ones that are mixed for each sample.

    Raises:
        ValueError: it is no convolution with zeros at the edge, or `count` is below 2.
    """
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros":
        raise ValueError("give a convolution, such as one named conv1 or conv2")
    if not isinstance(count, int) or isinstance(count, bool) or count < 2:
        raise ValueError("count: give 2 or more")
    return Experts(layer, count)
