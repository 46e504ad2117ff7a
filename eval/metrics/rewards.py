"""Learned human preferences as metrics, from their authors' packages.

Do not use a reward that the student was trained on, or a similar one: such scores rise while images
get worse. Figures are averages on the scales of the papers' tables. PickScore is in `clip.py`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from eval.errors import MetricError
from eval.fetch import package
from eval.metrics.features import device
from eval.samples import Samples, by_prompt, pillow_images


class ImageReward:
    """ImageReward v1.0 (Xu et al. 2023, arXiv:2304.05977), raw: about N(0, 1) over its data."""

    @cached_property
    def model(self) -> Any:
        reward = package("ImageReward", "image-reward")
        try:
            return reward.load("ImageReward-v1.0", device=str(device()))
        except OSError as error:
            raise MetricError(
                f"image-reward: its weights cannot be downloaded ({error}); run it where there is "
                "a network"
            ) from error

    @torch.no_grad()
    def __call__(self, samples: Samples) -> dict[str, float]:
        pairs = zip(samples.prompts, pillow_images(samples.images))
        scores = [self.model.score(prompt, image) for prompt, image in pairs]
        return {"image_reward": sum(scores) / len(scores)}


class HPS:
    """Human Preference Score v2.1 (Wu et al. 2023, arXiv:2306.09341), times 100 as in its table."""

    def __call__(self, samples: Samples) -> dict[str, float]:
        hps = package("hpsv2", "hpsv2")
        values: list[float] = []
        # one call for each prompt, because each call loads the model
        for prompt, indices in by_prompt(samples.prompts).items():
            try:
                scores = hps.score(
                    pillow_images(samples.images[indices]), prompt, hps_version="v2.1"
                )
            except OSError as error:
                raise MetricError(
                    f"hpsv2: its weights cannot be downloaded ({error}); run it where there is a "
                    "network"
                ) from error
            values += [float(v) for v in scores]
        return {"hps_v2.1": 100 * sum(values) / len(values)}
