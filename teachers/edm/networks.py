"""EDM's networks (arXiv:2206.00364): DDPM++ and NCSN++ (arXiv:2011.13456), ADM (arXiv:2105.05233).

All are U-Nets with one structure, called as F(x, c_noise, labels). They differ in how blocks use
the noise embedding, in resampling filters, and in side branches that carry the image. They run in
the dtype of their weights; use_fp16 of the published files is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.edm.parts import Resample, Stage, one_hot, stages


class Attention(nn.Module):
    """Self-attention over the pixels, added to its input."""

    def __init__(self, channels: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels, eps)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, self.heads, c // self.heads, 3, h * w)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).unbind(0)  # (B, heads, pixels, channels of one)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(2, 3).reshape(b, c, h, w))


class Block(nn.Module):
    """A residual block with noise embedding, optional resampling before and attention after it.

    Args:
        cin, cout, width: Channels in and out, and of the embedding.
        heads: Of the attention; 0 for none.
        scaled: The embedding scales and shifts, as in ADM; else it only shifts.
        gain: Factor of each residual sum; √½ keeps the variance.
        resize: "up", "down" or none; a `projected` skip has a 1×1 convolution even if cin = cout.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        width: int,
        *,
        heads: int,
        scaled: bool,
        gain: float,
        eps: float,
        taps: Sequence[float],
        projected: bool,
        dropout: float,
        resize: str | None = None,
    ) -> None:
        super().__init__()
        self.gain, self.scaled = gain, scaled
        self.resize = Resample(taps, resize == "up") if resize else nn.Identity()
        self.norm_in = group_norm(cin, eps)
        self.conv_in = nn.Conv2d(cin, cout, 3, padding=1)
        self.embed = nn.Linear(width, 2 * cout if scaled else cout)
        self.norm_out = group_norm(cout, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(cout, cout, 3, padding=1)
        straight = cin == cout and not (resize and projected)
        self.skip = nn.Identity() if straight else nn.Conv2d(cin, cout, 1)
        self.attention = Attention(cout, heads, eps) if heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.conv_in(self.resize(F.silu(self.norm_in(x))))
        embedding = self.embed(emb)[:, :, None, None]
        if self.scaled:
            scale, shift = embedding.chunk(2, dim=1)
            y = shift + (1 + scale) * self.norm_out(y)
        else:
            y = self.norm_out(y + embedding)
        y = self.conv_out(self.dropout(F.silu(y)))
        x = self.gain * (self.skip(self.resize(x)) + y)
        return x if self.attention is None else self.gain * self.attention(x)


class SkipSide(nn.Module):
    """The input image, downsampled and added to the features."""

    def __init__(self, cin: int, cout: int, taps: Sequence[float]) -> None:
        super().__init__()
        self.resize, self.conv = Resample(taps, up=False), nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        image = self.resize(image)
        return x + self.conv(image), image


class ResidualSide(nn.Module):
    """NCSN++'s side branch: features of the input image, mixed with the main features."""

    def __init__(self, cin: int, cout: int, taps: Sequence[float]) -> None:
        super().__init__()
        # the convolution's padding is the filter's margin
        self.conv = nn.Conv2d(cin, cout, 3, padding=1 + (len(taps) - 1) // 2)
        self.resize = Resample(taps, up=False, pad=0)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        x = (x + self.resize(self.conv(image))) / math.sqrt(2)
        return x, x


SIDES = {"standard": None, "skip": SkipSide, "residual": ResidualSide}


class Head(nn.Module):
    """From features to an image."""

    def __init__(self, cin: int, cout: int, eps: float) -> None:
        super().__init__()
        self.norm, self.conv = group_norm(cin, eps), nn.Conv2d(cin, cout, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


# Makes a block from (channels in, channels out), with keywords `attends` and `resize`.
Maker = Callable[..., Block]


class UNet(nn.Module):
    """The common U-Net: an encoder to the coarsest resolution and a decoder with skip connections.

    Args:
        stem: Channels of the first convolution.
        widths: Channels at each resolution, the finest first; each resolution is half the last.
        attend_last: In the decoder, only a resolution's last block has attention.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        stem: int,
        widths: Sequence[int],
        num_blocks: int,
        attn_resolutions: Sequence[int],
        make: Maker,
        attend_last: bool = False,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        taps: Sequence[float] = (1, 1),
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(img_channels, stem, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.enlarge = Resample(taps, up=True)
        levels = [(img_resolution >> i, width) for i, width in enumerate(widths)]
        now, image, skips = stem, img_channels, [stem]
        for resolution, width in levels:
            stage = Stage()
            if len(self.encoder):
                stage.resize = make(now, now, resize="down")
                if side := SIDES[encoder_type]:
                    stage.side = side(image, now, taps)
                    image = now if encoder_type == "residual" else image
                skips.append(now)
            for _ in range(num_blocks):
                stage.blocks.append(make(now, width, attends=resolution in attn_resolutions))
                now = width
                skips.append(now)
            self.encoder[str(resolution)] = stage
        for resolution, width in reversed(levels):
            stage = Stage()
            if len(self.decoder):
                stage.resize = make(now, now, resize="up")
            else:
                stage.middle.extend([make(now, now, attends=True), make(now, now)])
            for i in range(num_blocks + 1):
                attends = resolution in attn_resolutions and (i == num_blocks or not attend_last)
                stage.blocks.append(make(now + skips.pop(), width, attends=attends))
                now = width
            self.decoder[str(resolution)] = stage
            if decoder_type == "skip" or resolution == img_resolution:
                self.heads[str(resolution)] = Head(now, img_channels, eps)

    def embedding(self, time: Tensor, labels: Tensor | None) -> Tensor:
        """The embedding of time and label for the blocks, (B, width)."""
        raise NotImplementedError

    def forward(self, x: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """F, shaped like x.

        Args:
            x: (B, C, H, W), scaled to unit variance.
            time: c_noise = ¼ log σ, (B,).
            class_labels: (B,) integers; label_dim and None mean no label.
        """
        x = x.to(self.stem.weight.dtype)
        emb = self.embedding(time, class_labels)
        image, x = x, self.stem(x)
        skips = [x]
        for stage in stages(self.encoder).values():
            if stage.resize is not None:
                x = stage.resize(x, emb)
                if stage.side is not None:
                    x, image = stage.side(x, image)
                skips.append(x)
            for block in stage.blocks:
                x = block(x, emb)
                skips.append(x)
        out = None
        for resolution, stage in stages(self.decoder).items():
            for block in stage.middle:
                x = block(x, emb)
            if stage.resize is not None:
                x = stage.resize(x, emb)
            for block in stage.blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), emb)
            if resolution in self.heads:
                made = self.heads[resolution](x)
                out = made if out is None else made + self.enlarge(out)
        assert out is not None
        return out


class SongUNet(UNet):
    """DDPM++ and NCSN++ (arXiv:2011.13456), as EDM trains them; arguments as in its checkpoints.

    EDM's augmentation label is omitted: it is zero for undistorted images and enters through a
    layer without bias.
    """

    frequencies: Tensor

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        width, noise = model_channels * channel_mult_emb, model_channels * channel_mult_noise

        def make(cin: int, cout: int, attends: bool = False, resize: str | None = None) -> Block:
            return block(cin, cout, width, heads=int(attends), resize=resize)

        block = partial(
            Block,
            scaled=False,
            gain=math.sqrt(0.5),
            eps=1e-6,
            taps=resample_filter,
            projected=True,
            dropout=dropout,
        )
        super().__init__(
            img_resolution,
            img_channels,
            model_channels,
            [model_channels * m for m in channel_mult],
            num_blocks,
            attn_resolutions,
            make,
            True,
            encoder_type,
            decoder_type,
            resample_filter,
            eps=1e-6,
        )
        self.label_dim, self.noise = label_dim, noise
        if embedding_type == "fourier":
            self.register_buffer("frequencies", torch.randn(noise // 2) * 16)
        else:
            self.register_buffer("frequencies", None)
        self.label = nn.Linear(label_dim, noise) if label_dim else None
        self.mlp = nn.Sequential(
            nn.Linear(noise, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def embedding(self, time: Tensor, labels: Tensor | None) -> Tensor:
        dtype = self.stem.weight.dtype
        if self.frequencies is None:
            emb = waves(time, decay(self.noise, time, ends=True), sine_first=True)
        else:
            emb = waves(time, 2 * math.pi * self.frequencies.float(), sine_first=True)
        emb = emb.to(dtype)
        if self.label is not None:
            rows = one_hot(labels, self.label_dim, emb)
            emb = emb + self.label(rows * math.sqrt(self.label_dim))
        return self.mlp(emb)


class DhariwalUNet(UNet):
    """ADM (arXiv:2105.05233), as EDM trains it; arguments as in its checkpoints.

    Augmentation labels are omitted, as in `SongUNet`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
    ) -> None:
        width = model_channels * channel_mult_emb

        def make(cin: int, cout: int, attends: bool = False, resize: str | None = None) -> Block:
            return block(cin, cout, width, heads=cout // 64 if attends else 0, resize=resize)

        block = partial(
            Block, scaled=True, gain=1.0, eps=1e-5, taps=(1, 1), projected=False, dropout=dropout
        )
        widths = [model_channels * m for m in channel_mult]
        super().__init__(
            img_resolution, img_channels, widths[0], widths, num_blocks, attn_resolutions, make
        )
        self.label_dim, self.noise = label_dim, model_channels
        self.label = nn.Linear(label_dim, width, bias=False) if label_dim else None
        self.mlp = nn.Sequential(
            nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width)
        )

    def embedding(self, time: Tensor, labels: Tensor | None) -> Tensor:
        emb = waves(time, decay(self.noise, time)).to(self.stem.weight.dtype)
        emb = self.mlp(emb)
        if self.label is not None:
            emb = emb + self.label(one_hot(labels, self.label_dim, emb))
        return F.silu(emb)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """At most 32 groups, of at least four channels each."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


def decay(channels: int, like: Tensor, ends: bool = False) -> Tensor:
    """Frequencies (channels / 2,) from 1 down to 1/10000, inclusive if `ends`."""
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=like.device)
    return 1e-4 ** (steps / (half - 1 if ends else half))


def waves(time: Tensor, frequencies: Tensor, sine_first: bool = False) -> Tensor:
    """Sines and cosines of the time (B,) at each frequency, (B, 2F)."""
    angle = torch.outer(time.float(), frequencies)
    parts = [angle.sin(), angle.cos()] if sine_first else [angle.cos(), angle.sin()]
    return torch.cat(parts, dim=1)
