"""The clips as training data: copies that are a little faster or slower, louder or softer."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent
SCALE = 5.0  # a clip's peak; the data's deviation is then near 1


def clips() -> tuple[Tensor, Tensor]:
    """The recorded clips (N, 1, 2048), and their labels (N,): kick, snare, hat, tabla."""
    stored = load_file(FOLDER / "clips.safetensors")
    return SCALE * stored["sounds"].float() / 32767, stored["labels"]


def varied(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n varied copies, as many of each label: (n, 1, 2048) and (n,)."""
    draw = torch.Generator().manual_seed(seed)
    sounds, labels = clips()
    wanted = torch.arange(n) % 4
    index = torch.empty(n, dtype=torch.int64)
    for label in range(4):
        known, places = (labels == label).nonzero()[:, 0], (wanted == label).nonzero()[:, 0]
        index[places] = known[torch.randint(len(known), (len(places),), generator=draw)]
    x = sounds[index]
    speed = torch.empty(n, 1).uniform_(-0.25, 0.25, generator=draw).exp2()
    position = torch.arange(x.shape[-1]) * speed
    below = position.long().clamp(max=x.shape[-1] - 2)
    part = (position - below).clamp(0, 1)
    x = x[:, 0].gather(1, below) * (1 - part) + x[:, 0].gather(1, below + 1) * part
    x = x * (position < 2047)
    gain = torch.empty(n, 1).uniform_(0.6, 1.0, generator=draw)
    sign = 2 * torch.randint(2, (n, 1), generator=draw) - 1  # polarity is not heard
    return (sign * gain * x)[:, None], wanted
