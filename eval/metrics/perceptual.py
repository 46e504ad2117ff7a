"""Distances between pictures: diversity within a prompt, agreement with the teacher.

LPIPS is Zhang et al. 2018 (arXiv:1801.03924), version 0.1, by its authors' package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from eval import fetch
from eval.errors import MetricError, unknown
from eval.fetch import package
from eval.metrics.features import device
from eval.resize import stretched_lanczos
from eval.samples import Samples, by_prompt

Distance = Callable[[Tensor, Tensor], Tensor]  # two uint8 (N, 3, H, W) -> (N,)

# torchvision's ImageNet weights; eight digits of the SHA-256 are in the name.
TRUNKS = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
}


@cache
def lpips(trunk: str = "vgg") -> Distance:
    """LPIPS on `vgg` (diversity in papers) or `alex`.

    The package would unpickle the trunk's weights, so they are put in place here.

    Raises:
        MetricError: there is no such trunk, the package is missing, or weights cannot be had.
    """
    if trunk not in TRUNKS:
        raise unknown("lpips trunk", trunk, TRUNKS)
    network = package("lpips", "lpips").LPIPS(net=trunk, pnet_rand=True, verbose=False).eval()
    weights = fetch.state(f"https://download.pytorch.org/models/{TRUNKS[trunk]}")
    with torch.no_grad():
        for name, parameter in network.net.named_parameters():  # slice1.0.weight, …
            parameter.copy_(weights["features." + name.partition(".")[2]])
    network = network.requires_grad_(False).to(device())

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        x, y = (v.to(device()).float() / 127.5 - 1 for v in (a, b))
        return network(x, y).flatten().cpu()

    return distance


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (N,) in decibels of two uint8 (N, C, H, W); equal ones are ∞."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


class Diversity:
    """LPIPS over all pairs of a prompt's pictures, averaged over prompts, as a metric.

    Pictures of a prompt must come in one chunk, four or more of each; at 512² for figures
    comparable to DMD2's (arXiv:2405.14867). Noise is diverse too: read it beside a fidelity.
    """

    def __init__(self, distance: Distance, size: int = 512, name: str = "lpips_diversity") -> None:
        self.distance, self.size, self.name = distance, size, name

    def __call__(self, samples: Samples) -> dict[str, float]:
        """Raises: MetricError: some prompt has a single picture."""
        groups = by_prompt(samples.prompts)
        if lonely := next((p for p, of in groups.items() if len(of) < 2), None):
            raise MetricError(f"{self.name}: prompt {lonely!r} has one picture; draw two or more")
        images = stretched_lanczos(samples.images, self.size)
        found = []
        for members in groups.values():
            a, b = (torch.tensor(side) for side in zip(*combinations(members, 2)))
            found.append(self.distance(images[a], images[b]).double().mean())
        return {self.name: torch.stack(found).mean().item()}


class Agreement:
    """How near samples come to the teacher's of the same noise and prompts, as a metric.

    A student that is trained on distributions alone may be good and disagree.
    """

    def __init__(
        self, teacher: Callable[[list[str]], Tensor], distance: Distance, name: str = "teacher"
    ) -> None:
        """`teacher` gives the pictures, uint8 (N, 3, H, W), that it made of the same noise."""
        self.teacher, self.distance, self.name = teacher, distance, name

    def __call__(self, samples: Samples) -> dict[str, float]:
        """Raises: MetricError: the teacher's pictures are of another shape."""
        theirs = self.teacher(samples.prompts)
        if theirs.shape != samples.images.shape:
            raise MetricError(
                f"agreement: samples are {tuple(samples.images.shape)}, the teacher's "
                f"{tuple(theirs.shape)}; draw both for the same prompts at one size"
            )
        return {
            f"{self.name}_lpips": self.distance(samples.images, theirs).double().mean().item(),
            f"{self.name}_psnr": psnr(samples.images, theirs).mean().item(),
        }
