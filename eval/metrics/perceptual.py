"""Distances between images: diversity and variety within a prompt, agreement with the teacher.

LPIPS is that of Zhang et al. 2018 (arXiv:1801.03924), version 0.1, from its authors' package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations

import torch
from torch import Tensor, nn

from eval import fetch
from eval.errors import MetricError, unknown
from eval.fetch import package
from eval.metrics.base import Features
from eval.metrics.features import device
from eval.resize import stretched_lanczos
from eval.samples import Samples, by_prompt

Distance = Callable[[Tensor, Tensor], Tensor]  # two uint8 (N, 3, H, W) -> (N,)

# torchvision's ImageNet weights; the names end in eight digits of the SHA-256
TRUNKS = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
}


def lpips_network(trunk: str = "vgg") -> nn.Module:
    """The frozen network of LPIPS on the CPU: of images (N, 3, H, W) in [-1, 1], with gradients.

    The trunk's weights are loaded here, because the package would unpickle them.

    Raises:
        MetricError: there is no such trunk, or the package or weights are missing.
    """
    if trunk not in TRUNKS:
        raise unknown("lpips trunk", trunk, TRUNKS)
    network = package("lpips", "lpips").LPIPS(net=trunk, pnet_rand=True, verbose=False).eval()
    weights = fetch.state_dict(f"https://download.pytorch.org/models/{TRUNKS[trunk]}")
    with torch.no_grad():
        for name, parameter in network.net.named_parameters():  # slice1.0.weight, …
            parameter.copy_(weights["features." + name.partition(".")[2]])
    return network.requires_grad_(False)


@cache
def lpips(trunk: str = "vgg") -> Distance:
    """LPIPS with the trunk `vgg`, as papers use for diversity, or `alex`.

    Raises:
        MetricError: as `lpips_network`.
    """
    network = lpips_network(trunk).to(device())

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        x, y = (v.to(device()).float() / 127.5 - 1 for v in (a, b))
        return network(x, y).flatten().cpu()

    return distance


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (N,) in dB of two uint8 (N, C, H, W); ∞ for equal images."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


class Diversity:
    """LPIPS over all pairs of a prompt's images, averaged over prompts, as a metric.

    All images of a prompt must be in one chunk. Use four or more of each, at 512², for figures
    comparable with DMD2's (arXiv:2405.14867). Noise is diverse too, so compare fidelity as well.
    """

    def __init__(self, distance: Distance, size: int = 512, name: str = "lpips_diversity") -> None:
        self.distance, self.size, self.name = distance, size, name

    def __call__(self, samples: Samples) -> dict[str, float]:
        """Raises: MetricError: a prompt has a single image."""
        groups = by_prompt(samples.prompts)
        if single := next((p for p, members in groups.items() if len(members) < 2), None):
            raise MetricError(f"{self.name}: prompt {single!r} has one image; sample two or more")
        images = stretched_lanczos(samples.images, self.size)
        distances = []
        for members in groups.values():
            a, b = (torch.tensor(side) for side in zip(*combinations(members, 2)))
            distances.append(self.distance(images[a], images[b]).double().mean())
        return {self.name: torch.stack(distances).mean().item()}


def spread(features: Tensor, prompts: list[str]) -> float:
    """The square distance of the features (N, D) of two samples of one prompt: its mean over the
    pairs of a prompt, then over prompts. Prompts with a single sample have no part.

    Raises:
        MetricError: every prompt has a single sample.
    """
    groups = [members for members in by_prompt(prompts).values() if len(members) > 1]
    if not groups:
        raise MetricError("variety: every prompt has one image; sample two or more")
    return sum(2 * features[v].double().var(0).sum().item() for v in groups) / len(groups)


class Variety:
    """`spread` as a share of that of reference images of the same prompts, as a metric.

    1 is the reference's own variety, and 0 is a generator that has one image for each prompt. Noise
    and wrong images are varied too, so compare fidelity as well.
    """

    def __init__(self, features: Features, reference: Samples) -> None:
        """Raises: MetricError: the reference has no variety."""
        self.features = features
        self.spread = spread(features(reference.images), reference.prompts)
        if not self.spread > 0:
            raise MetricError("variety: the reference's images of a prompt have equal features")

    def __call__(self, samples: Samples) -> dict[str, float]:
        """Raises: MetricError: every prompt has a single sample."""
        found = spread(self.features(samples.images), samples.prompts)
        return {"variety": found / self.spread}


class Agreement:
    """The distance of samples to the teacher's from the same noise and prompts, as a metric.

    A student that was trained to match distributions can be good and still disagree.
    """

    def __init__(
        self, teacher: Callable[[list[str]], Tensor], distance: Distance, name: str = "teacher"
    ) -> None:
        """`teacher` returns its images, uint8 (N, 3, H, W), from the same noise."""
        self.teacher, self.distance, self.name = teacher, distance, name

    def __call__(self, samples: Samples) -> dict[str, float]:
        """Raises: MetricError: the teacher's images have another shape."""
        targets = self.teacher(samples.prompts)
        if targets.shape != samples.images.shape:
            raise MetricError(
                f"agreement: samples are {tuple(samples.images.shape)}, the teacher's "
                f"{tuple(targets.shape)}; sample both for the same prompts at one size"
            )
        return {
            f"{self.name}_lpips": self.distance(samples.images, targets).double().mean().item(),
            f"{self.name}_psnr": psnr(samples.images, targets).mean().item(),
        }
