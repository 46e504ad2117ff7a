"""DSNO: the teacher's UNet for several times at once, with layers that mix the times.

Zheng et al. 2022, "Fast Sampling of Diffusion Models via Operator Learning" (arXiv:2211.13449;
code: devzhk/DSNO-pytorch). The same noise goes through the network once for each of T times, with
that time's embedding. After each layer of a stage, a temporal Fourier layer adds a linear map of
the lowest frequencies over the T. The outputs are states of the teacher's trajectory at the T times
(`distill/objectives/pairs/dsno.py`), and the last is the sample: all T are computed at inference.

Differs from the paper: the Fourier layers begin at zero, so that the student begins as T
independent calls of the teacher's network; and that network may predict v, a flow or EDM's F. As in
the paper, its output is read as x is at pure noise, whatever the time that it is told.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.architecture.get import KEY
from students.lora import network_of
from students.own_network import is_plain
from teachers.denoiser import PREDICTIONS, Network
from teachers.errors import UserError
from teachers.families.base import Pretrained
from teachers.solver import STATES, quadratic_times
from teachers.teacher import Teacher


def dsno(teacher: Teacher) -> Network:
    """A DSNO with a teacher's weights, which predicts x.

    Raises:
        UserError: the teacher's network is no UNet2DModel, or predicts noise.
    """
    source = network_of(teacher.denoiser)
    before: Any = source.backbone
    if not isinstance(source, Pretrained) or type(before).__name__ != "UNet2DModel":
        raise UserError(
            f"{KEY}: dsno is made of a UNet2DModel, and the teacher's network is a "
            f"{type(before).__name__}; write a network in a file of your own"
        )
    if source.coefficients is PREDICTIONS["eps"]:
        raise UserError(
            f"{KEY}: dsno reads x̂ from pure noise, where a network that predicts noise has none; "
            "take a teacher that predicts x, v, a flow or EDM's F"
        )
    settings = {k: v for k, v in dict(before.config).items() if k[0] != "_" and is_plain(v)}
    made = DSNO(settings)
    made.unet.load_state_dict({made.name_of(k): v for k, v in before.state_dict().items()}, False)
    alpha, sigma = source.process.scales(torch.ones((), dtype=torch.float64))
    sigma_data = source.schedule.sigma_data
    made.scale = (1 / sigma if sigma_data is None else (sigma**2 + sigma_data**2).rsqrt()).float()
    made.skip, made.out = (v.float() for v in source.coefficients(alpha, sigma))
    made.times = source.time(torch.tensor(quadratic_times(STATES))).float()
    return Network(made, source.process, "x")


class DSNO(nn.Module):
    """F(x_t, t, cond): x̂ of noise x_t, the last of T outputs. It reads no time but its own T.

    Args:
        settings: Of the teacher's UNet2DModel.
        states: T.
        modes: Frequencies over the T, from 0, that Fourier layers read and write.

    Attributes:
        times: As the UNet is told them (T,).
        scale: What x_t is multiplied by for the UNet.
        skip, out: x̂ = skip x_t + out F.
    """

    def __init__(self, settings: dict[str, Any], states: int = 4, modes: int = 2) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.settings, self.states, self.modes = settings, states, modes
        self.times: Tensor
        self.scale: Tensor
        self.skip: Tensor
        self.out: Tensor
        self.register_buffer("times", torch.zeros(states))
        for name in ("scale", "skip", "out"):
            self.register_buffer(name, torch.ones(()))
        self.unet: Any = UNet2DModel.from_config(settings)
        widths = settings["block_out_channels"]
        ways = [*zip(self.unet.down_blocks, widths, strict=True)]
        ways += [*zip(self.unet.up_blocks, widths[::-1], strict=True)]
        if self.unet.mid_block is not None:
            ways.append((self.unet.mid_block, widths[-1]))
        for block, width in ways:
            attentions = [m for m in getattr(block, "attentions", ()) if m is not None]
            layers = block.attentions if attentions else block.resnets
            for i, layer in enumerate(layers[:1] if block is self.unet.mid_block else layers):
                layers[i] = Mixed(layer, width, states, modes)

    def name_of(self, name: str) -> str:
        """The name in this UNet of a weight of the teacher's."""
        for path, module in self.unet.named_modules():
            if isinstance(module, Mixed) and name.startswith(f"{path}."):
                return f"{path}.layer{name.removeprefix(path)}"
        return name

    def forward(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None) -> Tensor:
        """x̂ (B, C, H, W) of the last time."""
        return self.outputs(x_t, t, cond)[:, -1]

    def outputs(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor] | None) -> Tensor:
        """The outputs (B, T, C, H, W) at the T times."""
        x = x_t.repeat_interleave(self.states, 0)
        labels = None if cond is None else cond.get("class_labels")
        labels = None if labels is None else labels.repeat_interleave(self.states, 0)
        told = self.times.repeat(len(x_t))
        out = self.unet(self.scale * x, told, class_labels=labels, return_dict=False)[0]
        return (self.skip * x + self.out * out[:, : x.shape[1]]).unflatten(0, (-1, self.states))


class Mixed(nn.Module):
    """A layer of the UNet, and what is added to its output by a linear map over the T times.

    A Fourier layer: x + LeakyReLU(irfft(W rfft(x))), W (width, width) complex for each of the
    lowest frequencies, and 0 for the others.
    """

    def __init__(self, layer: nn.Module, width: int, states: int, modes: int) -> None:
        super().__init__()
        self.layer, self.states = layer, states
        self.weight = nn.Parameter(torch.zeros(modes, width, width, 2))  # real, imaginary part

    def forward(self, *args: Any, **named: Any) -> Tensor:
        h = self.layer(*args, **named)
        x = h.unflatten(0, (-1, self.states))
        parts = torch.fft.rfft(x.float(), dim=1)[:, : len(self.weight)]
        parts = torch.einsum("bmchw,mcd->bmdhw", parts, torch.view_as_complex(self.weight))
        more = torch.fft.irfft(parts, n=self.states, dim=1)
        return h + F.leaky_relu(more).flatten(0, 1).to(h.dtype)
