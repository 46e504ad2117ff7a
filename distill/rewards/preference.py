"""Learned preference models as rewards: PickScore, HPS v2.1, ImageReward and the CLIP score.

Their networks are those of the evaluation (`eval.metrics`), frozen. Evaluation resizes with Pillow
and rounds to bytes, through which there is no gradient; a reward resizes with torch's antialiased
bicubic and rounds nothing. Values are on the scales of the figures of the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import floor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eval import resize
from eval.errors import MetricError
from eval.metrics.clip import PICK, PICK_TOKENIZER, CLIPEncoders
from eval.metrics.features import CLIP_L_336
from eval.metrics.rewards import HPS_SOURCE, HPSEncoders, RewardScorer
from teachers.errors import UserError


class Preference(NamedTuple):
    """A reward by a network that reads images and prompts.

    Calling it raises:
        UserError: the images are no pictures, the prompts no text, or the network is missing.

    name: As `rewards.*.function` has it.
    size: The side of the images that the network reads.
    prepare: From images (B, 3, H, W) in 0 … 255 to (B, 3, size, size), with their graph.
    value: From these and B prompts to (B,).
    """

    name: str
    size: Callable[[], int]
    prepare: Callable[[Tensor, int], Tensor]
    value: Callable[[Tensor, list[str]], Tensor]

    def __call__(self, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"rewards: {self.name} reads pictures of 1 or 3 channels, and these are "
                f"{tuple(images.shape[1:])}; name a function of your own"
            )
        if unread := [p for p in prompts if not isinstance(p, str)]:
            raise UserError(
                f"rewards: {self.name} reads captions, and these data have {unread[0]!r}; name a "
                "function of your own"
            )
        try:
            shown = self.prepare(pixels(images), self.size())
            return self.value(shown, list(prompts))
        except MetricError as error:
            raise UserError(f"rewards: {self.name}: {error}") from None


def pixels(images: Tensor) -> Tensor:
    """Images (B, 1|3, H, W) in [-1, 1] as (B, 3, H, W) in 0 … 255, clamped as files are.

    They are float32, or float64 as they were.
    """
    exact = images if images.dtype == torch.float64 else images.float()
    return ((exact.clamp(-1, 1) + 1) * 127.5).expand(-1, 3, -1, -1)


def cover(rounding: Callable[[float], int]) -> Callable[[Tensor, int], Tensor]:
    """The rule of `eval.resize.resize_then_centre`, by torch and without rounding to bytes."""

    def prepare(images: Tensor, size: int) -> Tensor:
        sides = resize.covering(images.shape[2:], size)
        if images.shape[2:] != sides:
            images = resize.bicubic(images, sides).clamp(0, 255)
        return resize.centre(images, size, rounding)

    return prepare


def of_encoders(
    name: str, encoders: CLIPEncoders, prepare: Callable[[Tensor, int], Tensor], factor: float = 1.0
) -> Preference:
    """A reward by the cosine of a CLIP's embeddings.

    Args:
        factor: Of the cosine; 0 for the network's own scale of training.
    """

    def value(shown: Tensor, prompts: list[str]) -> Tensor:
        return (factor or encoders.scale) * encoders.agreement(shown, prompts)

    return Preference(name, lambda: encoders.size, prepare, value)


def of_scorer(name: str, scorer: RewardScorer) -> Preference:
    """ImageReward, as a reward."""
    return Preference(name, lambda: scorer.size, cover(round), scorer.reward)


def pick_score() -> Preference:
    """PickScore v1 (Kirstain et al. 2023, arXiv:2305.01569): a CLIP-H's logit, near 20."""
    encoders = CLIPEncoders(*PICK, tokenizer=PICK_TOKENIZER)
    return of_encoders("pick-score", encoders, cover(floor), factor=0.0)


def hps() -> Preference:
    """Human Preference Score v2.1 (Wu et al. 2023, arXiv:2306.09341), times 100."""
    encoders = HPSEncoders(*HPS_SOURCE, tokenizer=PICK_TOKENIZER)
    return of_encoders("hps-v2.1", encoders, resize.fit_then_pad, factor=100.0)


def image_reward() -> Preference:
    """ImageReward v1.0 (Xu et al. 2023, arXiv:2304.05977), about N(0, 1)."""
    return of_scorer("image-reward", RewardScorer())


def clip_score() -> Preference:
    """The cosine of CLIP ViT-L/14 at 336 (Hessel et al. 2021, arXiv:2104.08718), no prefix."""
    return of_encoders("clip-score", CLIPEncoders(*CLIP_L_336), cover(floor))


PREFERENCES: dict[str, Callable[[], Preference]] = {
    "pick-score": pick_score,
    "hps-v2.1": hps,
    "image-reward": image_reward,
    "clip-score": clip_score,
}


@cache
def preference(name: str) -> Preference:
    """The built-in reward of a name in PREFERENCES; its network is loaded once, at the first call.

    Raises:
        KeyError: there is none.
    """
    return PREFERENCES[name]()
