"""Learned preferences of people, by the packages that their authors published, as metrics.

A reward that was trained on, or a relative of it, is no evidence: such scores rise while pictures
get worse. Averages over samples, on the scales of the papers' tables. PickScore is in `clip.py`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from eval.errors import MetricError
from eval.fetch import package
from eval.metrics.features import device
from eval.samples import Samples, by_prompt, pictures


class ImageReward:
    """ImageReward v1.0 (Xu et al. 2023, arXiv:2304.05977), raw: about N(0, 1) over its data."""

    @cached_property
    def model(self) -> Any:
        reward = package("ImageReward", "image-reward")
        try:
            return reward.load("ImageReward-v1.0", device=str(device()))
        except OSError as error:
            raise MetricError(f"image-reward: its weights are not to be had ({error})") from error

    @torch.no_grad()
    def __call__(self, samples: Samples) -> dict[str, float]:
        pairs = zip(samples.prompts, pictures(samples.images))
        found = [self.model.score(prompt, picture) for prompt, picture in pairs]
        return {"image_reward": sum(found) / len(found)}


class HPS:
    """Human Preference Score v2.1 (Wu et al. 2023, arXiv:2306.09341), times 100 as in its table."""

    def __call__(self, samples: Samples) -> dict[str, float]:
        hps = package("hpsv2", "hpsv2")
        found: list[float] = []
        for prompt, places in by_prompt(samples.prompts).items():  # it loads itself at each call
            try:
                scores = hps.score(pictures(samples.images[places]), prompt, hps_version="v2.1")
            except OSError as error:
                raise MetricError(f"hpsv2: its weights are not to be had ({error})") from error
            found += [float(v) for v in scores]
        return {"hps_v2.1": 100 * sum(found) / len(found)}
