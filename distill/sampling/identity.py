"""What a teacher is known by, where something on disk belongs to it alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from teachers.teacher import Teacher


def levels(teacher: Teacher) -> list[float]:
    """α and σ at both ends and the middle, to nine digits: a process may print less than it is."""
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    scales = torch.cat(teacher.denoiser.process.scales(t))
    return [float(f"{v:.9g}") for v in scales.tolist()]


def weights_hash(network: nn.Module) -> str:
    """A hash of all tensors in a network's state."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):  # some quantisers keep plain settings among them
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().tobytes())
    return digest.hexdigest()
