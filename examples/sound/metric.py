"""How far sounds are from the recorded ones: a Fréchet distance of log-spectrograms.

A sound's features are the logarithms of its energy in 8 bands at 8 times. For each label, a normal
distribution is fitted to the features of the samples and one to those of varied copies of the
recordings; the result is the mean of the four distances, over the number of features.
"""

import torch
from sounds import varied
from torch import Tensor

EDGES = (1, 3, 6, 12, 24, 40, 64, 96, 129)  # of the bands, in steps of 31 Hz
TIMES = 8


def features(x: Tensor) -> Tensor:
    """(N, 64) of sounds (N, 1, 2048)."""
    window = torch.hann_window(256)
    power = torch.stft(x[:, 0], 256, 128, window=window, return_complex=True).abs().square()
    bands = torch.stack([power[:, a:b].mean(1) for a, b in zip(EDGES, EDGES[1:])], 1)
    bands = torch.nn.functional.adaptive_avg_pool1d(bands, TIMES)
    return (bands + 1e-2).log10().flatten(1)


def distance(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of two sets of features (N, D), over D."""
    a, b = a.double(), b.double()
    left, right = torch.cov(a.T), torch.cov(b.T)
    values = torch.linalg.eigvals(left @ right).real.clamp(min=0)
    gap = (a.mean(0) - b.mean(0)).square().sum()
    trace = left.trace() + right.trace() - 2 * values.sqrt().sum()
    return ((gap + trace) / a.shape[1]).item()


def spectrogram_distance(samples: Tensor, teacher: Tensor, cond: dict[str, Tensor]) -> float:
    real, labels = varied(4096, seed=1)
    real, fake = features(real), features(samples)
    kinds = [(real[labels == k], fake[cond["class_labels"] == k]) for k in range(4)]
    return sum(distance(b, a) for a, b in kinds) / 4
