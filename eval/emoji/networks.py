"""Two networks that read emoji: concept, style, and features in two unlike spaces."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, relu


class Reader(nn.Module):
    """A network with a head for the concept and one for the style.

    Args:
        width: Numbers of a picture's features.
    """

    def __init__(self, width: int, concepts: int, styles: int) -> None:
        super().__init__()
        self.concept = nn.Linear(width, concepts)
        self.style = nn.Linear(width, styles)

    def features(self, x: Tensor) -> Tensor:
        """Features (N, width) of pictures (N, 3, 64, 64) in [-1, 1]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of concepts and of styles."""
        features = self.features(x)
        return self.concept(features), self.style(features)


class Residual(nn.Module):
    """A block of ResNet (He et al. 2015, arXiv:1512.03385)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(channels, out, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(relu(self.norm1(self.conv1(x)))))
        return relu(y + self.skip(x))


class ResNet(Reader):
    """A small residual network with batch normalisation; 1.6 M parameters."""

    def __init__(self, concepts: int, styles: int) -> None:
        super().__init__(224, concepts, styles)
        widths = (32, 64, 128, 224)
        self.stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(
            *(Residual(a, b, 1 if a == b else 2) for a, b in zip((32, *widths), widths))
        )

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(relu(self.norm(self.stem(x)))).mean((2, 3))


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of a map (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(f(channels)) for f in (torch.ones, torch.zeros))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return layer_norm(x, x.shape[-1:], self.weight, self.bias).permute(0, 3, 1, 2)


class Mixer(nn.Module):
    """A block of ConvNeXt (Liu et al. 2022, arXiv:2201.03545)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = ChannelNorm(channels)
        self.up = nn.Conv2d(channels, 3 * channels, 1)
        self.down = nn.Conv2d(3 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(gelu(self.up(self.norm(self.depthwise(x)))))


class ConvNeXt(Reader):
    """A small ConvNeXt on patches of 4 pixels; 1.4 M parameters."""

    def __init__(self, concepts: int, styles: int) -> None:
        super().__init__(192, concepts, styles)
        self.stem = nn.Sequential(nn.Conv2d(3, 96, 4, 4), ChannelNorm(96))
        self.early = nn.Sequential(Mixer(96), Mixer(96), Mixer(96))
        self.merge = nn.Sequential(ChannelNorm(96), nn.Conv2d(96, 192, 2, 2))
        self.late = nn.Sequential(Mixer(192), Mixer(192), Mixer(192))
        self.norm = nn.LayerNorm(192)

    def features(self, x: Tensor) -> Tensor:
        x = self.late(self.merge(self.early(self.stem(x))))
        return self.norm(x.mean((2, 3)))
