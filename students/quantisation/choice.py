"""The bits of each layer: what a sample loses by each, and the best choice of a mean.

MixDQ, Zhao et al. 2024 (arXiv:2405.17873). A layer of content is judged by the structural
similarity of pictures with those of the whole network (SSIM), another by the ratio of signal to
error of the samples in dB (SQNR). These two do not compare, so each group has a programme of its
own, and how the bits are divided between the two is tried.

Differs from the paper: a programme sums the errors' shares of power, 10^(-SQNR / 10), and not the
ratios in dB. Errors of layers add, and their dB do not: a sum of dB gives small layers eight bits
and large ones two. On the embedded shapes at four bits that had ninety times the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.architecture.knapsack import choices
from students.quantisation.layers import Bits, Layer, in_bits

WIDTHS = (2, 4, 8)  # bits that a layer's weights can have
DIVISIONS = 9  # of the bits between the two groups, that are tried
WINDOW = 7  # pixels of a side, over which SSIM takes its moments
LEAST = 1e-20  # of a mean square error, so that equal samples have a finite ratio


@dataclass(frozen=True)
class Whole:
    """What a student makes in full precision, that rounded ones are compared with.

    sample: Its x̂ (N, ...), always of the same noise and prompts.
    decode: Pictures (N, C, H, W) in [-1, 1] of them.
    """

    backbone: nn.Module
    layers: dict[str, Layer]
    sample: Callable[[], Tensor]
    decode: Callable[[Tensor], Tensor]
    first_token: bool = True

    @torch.no_grad()
    def rounded(self, bits: Mapping[str, Bits]) -> Tensor:
        """x̂ (N, ...) with layers in these bits."""
        with in_bits(self.layers, bits, self.first_token):
            return self.sample()


@torch.no_grad()
def sensitivities(whole: Whole, widths: tuple[int, ...], activations: int | None) -> Iterator[
    tuple[str, dict[int, float], float | None]
]:  # fmt: skip
    """Of each layer: its name, what samples keep by each width of its weights alone, and the
    SQNR in dB of its input alone in `activations` bits.

    What they keep is SSIM of layers of content, SQNR of others; larger is better.
    """
    x = whole.sample()
    pictures = whole.decode(x)
    for name, layer in whole.layers.items():
        kept = {}
        for width in widths:
            made = whole.rounded({name: Bits(weights=width)})
            content = layer.content
            kept[width] = ssim(pictures, whole.decode(made)) if content else sqnr(x, made)
        ratio = None
        if activations is not None:
            ratio = sqnr(x, whole.rounded({name: Bits(activations=activations)}))
        yield name, kept, ratio


def divided(
    kept: Mapping[str, Mapping[int, float]], layers: Mapping[str, Layer], mean: float
) -> Iterator[dict[str, int]]:
    """Choices of every layer's bits whose mean over weights is at most `mean`.

    First the even one, where `mean` is a width; then the best of each division of the bits between
    the groups.
    """
    if mean in WIDTHS:
        yield dict.fromkeys(kept, int(mean))
    groups = [[n for n in kept if layers[n].content is c] for c in (False, True)]
    sizes = [sum(layers[n].weights for n in group) for group in groups]
    total, (low, high) = int(mean * sum(sizes)), (min(WIDTHS), max(WIDTHS))
    least = max(low * sizes[0], total - high * sizes[1])  # of the first group
    most = min(high * sizes[0], total - low * sizes[1])
    seen: list[dict[str, int]] = []
    for i in range(DIVISIONS):
        first = least + (most - least) * i // (DIVISIONS - 1)
        found: dict[str, int] = {}
        for group, room in zip(groups, (first, total - first), strict=True):
            found |= choices(
                {n: worth(kept[n], layers[n].content) for n in group},
                {n: {w: w * layers[n].weights for w in kept[n]} for n in group},
                room,
            )
        if found not in seen:
            seen.append(found)
            yield found


def worth(kept: Mapping[int, float], content: bool) -> dict[int, float]:
    """What a programme sums, by width: SSIM, or minus the error's share of power, from SQNR."""
    return {w: v if content else -(10 ** (-v / 10)) for w, v in kept.items()}


@torch.no_grad()
def best(whole: Whole, candidates: Iterator[dict[str, int]]) -> dict[str, int]:
    """The choice whose pictures are nearest to the whole network's, by their mean square."""
    pictures = whole.decode(whole.sample())

    def error(bits: dict[str, int]) -> float:
        made = whole.rounded({n: Bits(weights=b) for n, b in bits.items()})
        return (whole.decode(made) - pictures).square().mean().item()

    return min(candidates, key=error)


def sqnr(whole: Tensor, rounded: Tensor) -> float:
    """10 lg(E x² / E (x - x̂)²), in dB."""
    error = (whole - rounded).square().mean().clamp(min=LEAST)
    return 10 * (whole.square().mean() / error).log10().item()


def ssim(a: Tensor, b: Tensor) -> float:
    """The mean structural similarity of pictures (N, C, H, W) in [-1, 1]; 1 of equal ones.

    Wang et al. 2004 (doi:10.1109/TIP.2003.819861), over even windows of `WINDOW` pixels.
    """
    a, b = a.double(), b.double()
    side = min(WINDOW, *a.shape[-2:])
    mean_a, mean_b, aa, bb, ab = (F.avg_pool2d(v, side, 1) for v in (a, b, a * a, b * b, a * b))
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # of a range of 2
    above = (2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2)
    spread = (aa - mean_a**2) + (bb - mean_b**2)
    return (above / ((mean_a**2 + mean_b**2 + c1) * (spread + c2))).mean().item()
