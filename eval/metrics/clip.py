"""CLIP score and PickScore: the agreement of images and prompts by CLIP models.

Model, prefix and resolution change a CLIP score by more than methods do, so all three are in the
figure's key.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from eval import fetch
from eval.metrics.features import CLIP, device, normalised
from eval.resize import centre_lanczos, resize_then_centre
from eval.samples import Samples

BATCH = 64
PICK = ("yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800")
PICK_TOKENIZER = (
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
)


class CLIPEncoders:
    """The two encoders of a CLIP model, loaded at the first call.

    source, revision: a folder, or a Hub repository and its revision.
    tokenizer: source and revision of the tokenizer, if the model has none.
    """

    def __init__(
        self, source: str, revision: str, tokenizer: tuple[str, str] | None = None
    ) -> None:
        self.source, self.revision = source, revision
        self.tokenizer = tokenizer or (source, revision)
        self.name = source.rstrip("/").rpartition("/")[2]

    @cached_property
    def model(self) -> tuple[Any, Any]:
        """The frozen network and its tokenizer."""
        return self.load(), fetch.tokenizer(*self.tokenizer)

    def load(self) -> Any:
        """The network, on the CPU."""
        return fetch.pretrained("CLIPModel", self.source, self.revision)

    @property
    def size(self) -> int:
        """The side of the images that the network reads."""
        return self.model[0].config.vision_config.image_size

    def prepared(self, images: Tensor) -> Tensor:
        """Uint8 images (N, 3, H, W) at the network's size, float32 in 0 … 255."""
        return resize_then_centre(images, self.size)

    @property
    def scale(self) -> float:
        """The factor of cosines in training."""
        return self.model[0].logit_scale.exp().item()

    @torch.no_grad()
    def cosines(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosines (N,), float64, of uint8 images (N, 3, H, W) and prompts."""
        pixels = self.prepared(images).to(device())
        return self.agreement(pixels, prompts).double().cpu()

    def agreement(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Cosines (N,) of prepared images (N, 3, size, size) in 0 … 255, with their graph."""
        network, tokenizer = self.model
        network.to(pixels.device)
        tokens = tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        output = network(
            pixel_values=normalised(pixels, CLIP),
            input_ids=tokens["input_ids"].to(pixels.device),
            attention_mask=tokens["attention_mask"].to(pixels.device),
        )
        return torch.cosine_similarity(output.image_embeds, output.text_embeds)

    def mean(self, samples: Samples, prefix: str = "", resolution: int | None = None) -> float:
        """The mean cosine of samples and their prompts, in batches."""
        cosines = []
        for i in range(0, len(samples.images), BATCH):
            images = samples.images[i : i + BATCH]
            if resolution is not None:
                images = centre_lanczos(images, resolution)
            prompts = [prefix + p for p in samples.prompts[i : i + BATCH]]
            cosines.append(self.cosines(images, prompts))
        return torch.cat(cosines).mean().item()


class ClipScore:
    """The mean cosine of images and prompts (Hessel et al. 2021, arXiv:2104.08718).

    It is the plain cosine, not clipped at 0 and not multiplied by 2.5 or 100.

    source, revision: the model, as in `CLIPEncoders`.
    prefix: precedes every prompt.
    resolution: images are cropped and resized to it by Lanczos before the model's own resize, as
        for COCO, so that larger images have no advantage.
    """

    def __init__(
        self,
        source: str,
        revision: str,
        prefix: str = "A photo depicts ",
        resolution: int = 256,
    ) -> None:
        self.encoders = CLIPEncoders(source, revision)
        self.prefix, self.resolution = prefix, resolution
        self.name = f"clip_score[{self.encoders.name}, {prefix.strip()!r}, {resolution}]"

    def __call__(self, samples: Samples) -> dict[str, float]:
        return {self.name: self.encoders.mean(samples, self.prefix, self.resolution)}


class PickScore:
    """PickScore v1 (Kirstain et al. 2023, arXiv:2305.01569): a CLIP-H's logit, near 20."""

    def __init__(self, encoders: CLIPEncoders | None = None) -> None:
        self.encoders = encoders or CLIPEncoders(*PICK, tokenizer=PICK_TOKENIZER)

    def __call__(self, samples: Samples) -> dict[str, float]:
        return {"pick_score": self.encoders.scale * self.encoders.mean(samples)}
