"""Feature extractors by name; each is a network of one version with one resize rule.

Those of `digits` and `shapes` are embedded. The others are downloaded once, and run on a GPU if
there is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from eval import digits, fetch, shapes
from eval.errors import MetricError, unknown
from eval.metrics.base import Features
from eval.resize import Resize, centre_then_resize, pil_bytes, pil_float, untouched

Network = Callable[[Tensor], Tensor]  # float32 (N, 3, size, size) in 0 … 255 -> (N, D)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# The 2015 graph of arXiv:1706.08500 as TorchScript, with a bilinear resize inside. Loading
# TorchScript runs no Python, and its hash is pinned.
GRAPH = "inception-2015-12-05"
INCEPTION = (
    f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{GRAPH}.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
)
DINOV2 = ("facebook/dinov2-large", "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c")
CLIP_L_336 = ("openai/clip-vit-large-patch14-336", "ce19dc912ca5cd21c8a653c79e251e808ccabcd1")


@dataclass(frozen=True)
class Extractor:
    """From images to features, by one network after one resize.

    name, version: recorded with every statistic of these features.
    network: what its weights are called; extractors with other resizes may share them.
    dim: the number of features of an image.
    size, resize: the side, and the rule, to which images are resized first.
    load: makes the network, at the first call.
    batch: the number of images in one call of the network.
    """

    name: str
    version: str
    dim: int
    size: int
    resize: Resize
    load: Callable[[], Network]
    batch: int = 64
    network: str = ""

    @property
    def rule(self) -> str:
        """All of it in one text, as statistics record it."""
        return f"{self.name} {self.version}, {self.resize.__name__} to {self.size}"

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D) float32 on the CPU, of uint8 images (N, 3|1, H, W).

        Raises:
            MetricError: images have another type or shape, or weights are missing.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise MetricError(
                f"features {self.name}: images are {images.dtype} {tuple(images.shape)}; "
                "give uint8 (N, 3, H, W)"
            )
        network = _loaded(self)
        parts = [
            network(self.resize(part.expand(-1, 3, -1, -1), self.size)).float().cpu()
            for part in images.split(self.batch)
        ]
        return torch.cat(parts)


@dataclass(frozen=True)
class Embedded:
    """Features of a classifier in this repository, for images of its own size."""

    name: str
    version: str
    dim: int
    read: Features

    @property
    def network(self) -> str:
        return self.name

    @property
    def rule(self) -> str:
        return f"{self.name} {self.version}, not resized"

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, dim) of uint8 images of the classifier's size.

        Raises:
            MetricError: images have another size.
        """
        return self.read(images)


@dataclass(frozen=True)
class Prepared:
    """Features of images after the crop or resize that a protocol prescribes."""

    prepare: Callable[[Tensor, int], Tensor]  # bytes to bytes
    size: int
    base: Extractor | Embedded

    @property
    def name(self) -> str:
        return f"{self.base.name}-{self.prepare.__name__}-{self.size}"

    @property
    def dim(self) -> int:
        return self.base.dim

    @property
    def rule(self) -> str:
        return f"{self.prepare.__name__} to {self.size}, then {self.base.rule}"

    def __call__(self, images: Tensor) -> Tensor:
        """Features (N, D) of uint8 images (N, C, H, W)."""
        return self.base(self.prepare(images, self.size))


NamedFeatures = Extractor | Embedded | Prepared


@cache
def _loaded(extractor: Extractor) -> Network:
    return extractor.load()


def device() -> torch.device:
    """The device of networks: a GPU, unless ACCELERATE_USE_CPU is set."""
    value = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    use_cpu = value in ("y", "yes", "t", "true", "on", "1")  # as Accelerate reads it
    return torch.device("cpu" if use_cpu or not torch.cuda.is_available() else "cuda")


def inception(head: Callable[[nn.Module, Tensor], Tensor]) -> Network:
    """The 2015 Inception graph; `head` takes the features from it."""
    network = torch.jit.load(str(fetch.download(*INCEPTION)), map_location=device()).eval()

    @torch.no_grad()
    def read(images: Tensor) -> Tensor:
        return head(network, images.to(device())).flatten(1)

    return read


def pool_of_resized(network: nn.Module, images: Tensor) -> Tensor:
    """pool3 (N, 2048) of images of 299×299, without the graph's own resize."""
    return network.layers((images - 128) / 128)  # pyright: ignore[reportCallIssue]


def pool(network: nn.Module, images: Tensor) -> Tensor:
    """pool3 (N, 2048) after the graph's own resize: TF1's bilinear, without antialiasing."""
    return network(images, return_features=True)


def logits(network: nn.Module, images: Tensor) -> Tensor:
    """Log probabilities (N, 1008) without the last layer's bias, as in the original score."""
    return network(images, no_output_bias=True).clamp(min=1e-30).log()


def normalised(images: Tensor, by: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """Images in 0 … 255, normalised by a network's mean and standard deviation in 0 … 1."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in by)
    return (images / 255 - mean) / std


def dinov2(source: str, revision: str) -> Network:
    """A `Dinov2Model` from a folder or the Hub: the class token (N, 1024) after the last norm."""
    network = fetch.pretrained("Dinov2Model", source, revision).to(device())

    @torch.no_grad()
    def read(images: Tensor) -> Tensor:
        return network(normalised(images.to(device()), IMAGENET)).last_hidden_state[:, 0]

    return read


def clip_image(source: str, revision: str) -> Network:
    """A `CLIPModel` from a folder or the Hub: projected image embeddings (N, D) of length one."""
    network = fetch.pretrained("CLIPModel", source, revision).to(device())

    @torch.no_grad()
    def read(images: Tensor) -> Tensor:
        output = network.vision_model(pixel_values=normalised(images.to(device()), CLIP))
        return torch.nn.functional.normalize(network.visual_projection(output.pooler_output), dim=1)

    return read


# The first three are FID's variants: the weights are the same, the resize before them is not.
EXTRACTORS: dict[str, Extractor | Embedded] = {
    e.name: e
    for e in (
        Extractor(
            "inception-clean", GRAPH, 2048, 299, pil_float,
            lambda: inception(pool_of_resized), network=GRAPH,
        ),
        Extractor(
            "inception-legacy-tensorflow", GRAPH, 2048, 299, untouched,
            lambda: inception(pool), network=GRAPH,
        ),
        Extractor(
            "inception-edm", GRAPH, 2048, 299, untouched,
            lambda: inception(pool), network=GRAPH,
        ),
        Extractor(
            "inception-logits", GRAPH, 1008, 299, untouched,
            lambda: inception(logits), network=GRAPH,
        ),
        Extractor(
            "dinov2-vitl14", DINOV2[1][:12], 1024, 224, pil_bytes,
            lambda: dinov2(*DINOV2), network=DINOV2[0],
        ),
        Extractor(
            "clip-vitl14-336", CLIP_L_336[1][:12], 768, 336, centre_then_resize,
            lambda: clip_image(*CLIP_L_336), network=CLIP_L_336[0],
        ),
        Embedded("digits", "1", 64, digits.features),
        Embedded("digits-dense", "1", 48, digits.dense_features),
        Embedded("shapes", "1", 64, shapes.features),
        Embedded("shapes-patches", "1", 48, shapes.patch_features),
    )
}  # fmt: skip


def extractor(name: str) -> Extractor | Embedded:
    """The extractor of that name.

    Raises:
        MetricError: there is none.
    """
    if name not in EXTRACTORS:
        raise unknown("features", name, EXTRACTORS)
    return EXTRACTORS[name]
