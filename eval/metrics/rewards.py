"""Learned human preferences as metrics. PickScore is in `clip.py`.

Do not use a reward that the student was trained on, or a similar one: such scores rise while images
get worse. Figures are averages on the scales of the papers' tables.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from eval import fetch
from eval.metrics import converted
from eval.metrics.clip import BATCH, PICK_TOKENIZER, CLIPEncoders
from eval.metrics.features import CLIP, device, normalised
from eval.resize import fit_then_pad, resize_then_centre
from eval.samples import Samples

# The authors name no revision of their files, and their packages read the newest.
HPS_SOURCE = ("xswu/HPSv2", "main")
IMAGE_REWARD_SOURCE = ("THUDM/ImageReward", "main")
BERT = ("google-bert/bert-base-uncased", "86b5e0934494bd15c9632b12f734a8a67f723594")


class HPSEncoders(CLIPEncoders):
    """The two encoders of HPS v2.1, a CLIP-H; `tokenizer` also has the config of that CLIP."""

    def load(self) -> Any:
        return converted.hps((self.source, self.revision), self.tokenizer)

    def prepared(self, images: Tensor) -> Tensor:
        return fit_then_pad(images, self.size)


class HPS:
    """Human Preference Score v2.1 (Wu et al. 2023, arXiv:2306.09341), times 100 as in its table."""

    def __init__(self, encoders: CLIPEncoders | None = None) -> None:
        self.encoders = encoders or HPSEncoders(*HPS_SOURCE, tokenizer=PICK_TOKENIZER)

    def __call__(self, samples: Samples) -> dict[str, float]:
        return {"hps_v2.1": 100 * self.encoders.mean(samples)}


class RewardScorer:
    """ImageReward's network and tokenizer, loaded at the first call.

    source, tokenizer: folders, or Hub repositories and their revisions.
    sizes: of the network's layers, where they are not the published ones.
    """

    TOKENS = 35  # of a prompt; the others are cut

    def __init__(
        self,
        source: tuple[str, str] = IMAGE_REWARD_SOURCE,
        tokenizer: tuple[str, str] = BERT,
        sizes: converted.RewardSizes | None = None,
    ) -> None:
        self.source, self.tokenizer, self.sizes = source, tokenizer, sizes

    @cached_property
    def model(self) -> tuple[converted.ImageRewardNetwork, Any]:
        """The frozen network and its tokenizer."""
        network = converted.image_reward(self.source, self.sizes)
        return network, fetch.tokenizer(*self.tokenizer)

    @property
    def size(self) -> int:
        """The side of the images that the network reads."""
        return self.model[0].size

    @torch.no_grad()
    def values(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Rewards (N,), float64, of uint8 images (N, 3, H, W) and prompts."""
        pixels = resize_then_centre(images, self.size, round).to(device())
        return self.reward(pixels, prompts).double().cpu()

    def reward(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Rewards (N,) of prepared images (N, 3, size, size) in 0 … 255, with their graph."""
        network, tokenizer = self.model
        network.to(pixels.device)
        tokens = tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.TOKENS,
            return_tensors="pt",
        ).to(pixels.device)
        return network(normalised(pixels, CLIP), tokens["input_ids"], tokens["attention_mask"])


class ImageReward:
    """ImageReward v1.0 (Xu et al. 2023, arXiv:2304.05977), raw: about N(0, 1) over its data."""

    def __init__(self, scorer: RewardScorer | None = None) -> None:
        self.scorer = scorer or RewardScorer()

    def __call__(self, samples: Samples) -> dict[str, float]:
        parts = [
            self.scorer.values(samples.images[i : i + BATCH], samples.prompts[i : i + BATCH])
            for i in range(0, len(samples.images), BATCH)
        ]
        return {"image_reward": torch.cat(parts).mean().item()}
