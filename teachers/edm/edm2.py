"""EDM2's network (arXiv:2312.02696), which keeps its activations' magnitudes.

Weights are normalised at every use, so only their directions matter. The paper also rescales the
stored weights to unit length at every training step (eq. 66), which sets the effective learning
rate and changes no output. That is not done here: changing weights in the forward pass would break
a second forward before the backward. Gradients are orthogonal to the weights, so the mean square of
these, 1 in published networks, grows by about the square of Adam's rate in a step. In 200,000 steps
at 1e-4 this is 0.2 %, by half of which the effective rate falls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.edm.parts import Resample, Stage, one_hot, precise, stages


class Uncertainty(nn.Module):
    """u(σ) as a linear function of Fourier features of c_noise."""

    def __init__(self, logvar_channels: int = 128) -> None:
        super().__init__()
        self.noise, self.linear = Fourier(logvar_channels), Linear(logvar_channels, 1)

    def forward(self, time: Tensor) -> Tensor:
        return self.linear(self.noise(time).to(self.linear.weight.dtype))[:, 0].float()


def normalize(x: Tensor, dims: Sequence[int]) -> Tensor:
    """x divided by its root mean square along `dims`, plus a small term.

    The norm is at least in float32, and the result has mean square 1 (eq. 47).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    rms = torch.linalg.vector_norm(x, dim=list(dims), keepdim=True, dtype=dtype)
    rms = 1e-4 + rms / math.sqrt(x.numel() / rms.numel())
    return x / rms.to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU, at unit magnitude for normal inputs (eq. 81)."""
    return F.silu(x) / 0.596


def mix(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The weighted sum of a and b at constant magnitude; `share` is b's weight (eq. 88)."""
    return ((1 - share) * a + share * b) / math.hypot(1 - share, share)


def join(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Channels of a, then of b, weighted by b's share at constant magnitude (eq. 103)."""
    total = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - share) ** 2 + share**2))
    left, right = (1 - share) / math.sqrt(a.shape[1]), share / math.sqrt(b.shape[1])
    return torch.cat([total * left * a, total * right * b], dim=1)


class Fourier(nn.Module):
    """√2 cos(time · frequency + phase), (B,) to (B, F) in at least float32 (eq. 75)."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, time: Tensor) -> Tensor:
        frequencies = precise(self.frequencies)
        angle = torch.outer(time.to(frequencies.dtype), frequencies) + precise(self.phases)
        return math.sqrt(2) * angle.cos()


class Linear(nn.Module):
    """A linear map whose rows have unit length (eq. 47), times a gain."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin))

    def direction(self, gain: Tensor | float, dtype: torch.dtype) -> Tensor:
        weight = normalize(precise(self.weight), range(1, self.weight.ndim))
        return (weight * (gain / math.sqrt(weight[0].numel()))).to(dtype)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return F.linear(x, self.direction(gain, x.dtype))


class Conv(Linear):
    """A convolution that keeps the size, with filters of unit length."""

    def __init__(self, cin: int, cout: int, kernel: int) -> None:
        super().__init__(cin, cout)
        self.weight = nn.Parameter(torch.randn(cout, cin, kernel, kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.direction(gain, x.dtype)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class Attention(nn.Module):
    """Self-attention over the pixels, of normalised queries, keys and values."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = Conv(channels, 3 * channels, 1), Conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(x).view(b, self.heads, c // self.heads, 3, h * w)
        q, k, v = normalize(qkv, [2]).permute(3, 0, 1, 4, 2).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(2, 3).reshape(b, c, h, w))


class Block(nn.Module):
    """A block of the encoder, or of the decoder (figure 21).

    Args:
        cin, cout, width: Channels in and out, and of the embedding.
        heads: Of the attention; 0 for none.
        encodes: An encoder block: it changes channels and normalises pixels before the branch.
        resize: "up", "down" or none.
        balance, attn_balance: The branch's and the attention's shares of their sums.
        clip: Largest activation that leaves the block; None for no limit.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        width: int,
        heads: int,
        encodes: bool,
        resize: str | None,
        taps: Sequence[float],
        dropout: float,
        balance: float,
        attn_balance: float,
        clip: float | None,
    ) -> None:
        super().__init__()
        self.encodes, self.clip = encodes, clip
        self.balance, self.attn_balance = balance, attn_balance
        self.resize = Resample(taps, resize == "up") if resize else nn.Identity()
        self.skip = Conv(cin, cout, 1) if cin != cout else nn.Identity()
        self.conv_in = Conv(cout if encodes else cin, cout, 3)
        self.embed, self.gain = Linear(width, cout), nn.Parameter(torch.zeros([]))
        self.dropout = nn.Dropout(dropout)
        self.conv_out = Conv(cout, cout, 3)
        self.attention = Attention(cout, heads) if heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.resize(x)
        if self.encodes:
            x = normalize(self.skip(x), [1])
        y = self.conv_in(silu(x)) * (1 + self.embed(emb, self.gain))[:, :, None, None]
        y = self.conv_out(self.dropout(silu(y)))
        x = mix(x if self.encodes else self.skip(x), y, self.balance)
        if self.attention is not None:
            x = mix(x, self.attention(x), self.attn_balance)
        return x if self.clip is None else x.clamp(-self.clip, self.clip)


class UNet(nn.Module):
    """EDM2's U-Net (figure 21), called as F(x, c_noise, labels); arguments as in checkpoints."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        resample_filter: Sequence[float] = (1, 1),
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ) -> None:
        super().__init__()
        self.label_dim = label_dim
        self.label_balance, self.concat_balance = label_balance, concat_balance
        widths = [model_channels * m for m in channel_mult]
        noise = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        width = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        self.noise, self.time = Fourier(noise), Linear(noise, width)
        self.label = Linear(label_dim, width) if label_dim else None

        def make(
            cin: int, cout: int, encodes: bool, attends: bool = False, resize: str | None = None
        ) -> Block:
            heads = cout // channels_per_head if attends else 0
            return Block(
                cin,
                cout,
                width,
                heads,
                encodes,
                resize,
                resample_filter,
                dropout,
                res_balance,
                attn_balance,
                clip_act,
            )

        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        levels = [(img_resolution >> i, channels) for i, channels in enumerate(widths)]
        now = widths[0]
        self.stem = Conv(img_channels + 1, now, 3)
        skips = [now]
        for resolution, channels in levels:
            stage = Stage()
            if len(self.encoder):
                stage.resize = make(now, now, True, resize="down")
                skips.append(now)
            for _ in range(num_blocks):
                attends = resolution in attn_resolutions
                stage.blocks.append(make(now, channels, True, attends))
                now = channels
                skips.append(now)
            self.encoder[str(resolution)] = stage
        for resolution, channels in reversed(levels):
            stage = Stage()
            if len(self.decoder):
                stage.resize = make(now, now, False, resize="up")
            else:
                stage.middle.extend([make(now, now, False, True), make(now, now, False)])
            for _ in range(num_blocks + 1):
                attends = resolution in attn_resolutions
                stage.blocks.append(make(now + skips.pop(), channels, False, attends))
                now = channels
            self.decoder[str(resolution)] = stage
        self.out, self.gain = Conv(now, img_channels, 3), nn.Parameter(torch.zeros([]))

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """F, shaped like x.

        Args:
            x: (B, C, H, W), scaled to unit variance.
            time: c_noise = ¼ log σ, (B,).
            class_labels: (B,) integers; label_dim and None mean no label.
        """
        x = x.to(self.stem.weight.dtype)
        emb = self.time(self.noise(time).to(x.dtype))
        if self.label is not None:
            rows = one_hot(class_labels, self.label_dim, x) * math.sqrt(self.label_dim)
            emb = mix(emb, self.label(rows), self.label_balance)
        emb = silu(emb)
        x = self.stem(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))  # ones in place of biases
        skips = [x]
        for stage in stages(self.encoder).values():
            if stage.resize is not None:
                x = stage.resize(x, emb)
                skips.append(x)
            for block in stage.blocks:
                x = block(x, emb)
                skips.append(x)
        for stage in stages(self.decoder).values():
            for block in stage.middle:
                x = block(x, emb)
            if stage.resize is not None:
                x = stage.resize(x, emb)
            for block in stage.blocks:
                x = block(join(x, skips.pop(), self.concat_balance), emb)
        return self.out(x, self.gain)
