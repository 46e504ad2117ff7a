"""EDM and EDM2 networks as diffusers models, and as denoisers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from teachers.edm import edm2, networks
from teachers.families.unet import UNet
from teachers.storage.diffusers_config import Schedule

NETWORKS: dict[str, type[nn.Module]] = {
    "SongUNet": networks.SongUNet,
    "DhariwalUNet": networks.DhariwalUNet,
    "UNet": edm2.UNet,
}


class EDMModel(ModelMixin, ConfigMixin):
    """A network of EDM's or EDM2's, called as pipelines call a UNet2DModel of consistency models.

    Args:
        kind, arguments: The network class and its arguments.
        sample_size, in_channels, num_class_embeds: Config keys that pipelines read.
    """

    @register_to_config
    def __init__(
        self,
        kind: str,
        arguments: dict[str, Any],
        sample_size: int,
        in_channels: int,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        self.network = NETWORKS[kind](**arguments)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """F, shaped like `sample` (B, C, H, W), which is scaled to unit variance.

        Args:
            timestep: 250 log σ, a scalar or (B,); the network's input is a thousandth of it.
            class_labels: (B,) integers; num_classes and None mean no label.
        """
        time = torch.as_tensor(timestep, device=sample.device).expand(len(sample)) / 1000
        out = self.network(sample, time, class_labels)
        return UNet2DOutput(sample=out) if return_dict else (out,)


class EDM(UNet):
    """An EDM or EDM2 network as a denoiser.

    Args:
        uncertainty: EDM2's u(σ): the log of the expected loss at each noise level.
    """

    PIPELINES = ()
    BLOCKS = r"network\.(encoder|decoder)\.\d+\.((blocks|middle)\.\d+|resize)"
    TIME, SINUSOIDS = r"network\.(mlp\.2|time)", ""
    LORA = r".*(qkv|attention\.out|conv_in|conv_out|embed)"

    def __init__(
        self, backbone: nn.Module, schedule: Schedule, uncertainty: nn.Module | None = None
    ) -> None:
        super().__init__(backbone, schedule)
        self._uncertainty = (
            uncertainty,
        )  # in a tuple, so that it is not a submodule: nothing here trains it

    @property
    def middle(self) -> str:
        coarsest = next(iter(self.backbone.network.decoder))  # pyright: ignore
        return f"backbone.network.decoder.{coarsest}.middle.1"

    def logvar(self, t: Tensor) -> Tensor:
        """u(σ), (B,): the log of the weighted error expected at t (arXiv:2312.02696, eq. 21)."""
        (uncertainty,) = self._uncertainty
        assert uncertainty is not None, "this network came without its uncertainty"
        return uncertainty(self.time(t) / 1000)
