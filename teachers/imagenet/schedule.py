"""The rectified flow's stock scheduler, as `DiTPipeline` calls it."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


class FlowEuler(FlowMatchEulerDiscreteScheduler):
    """FlowMatchEulerDiscreteScheduler with a method that DiTPipeline calls before each step."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is: a flow's network needs no scaling."""
        return sample
