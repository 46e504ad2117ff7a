"""LoRA files added to a pipeline's frozen weights, once, when the teacher is loaded.

All networks of a run share these weights. So teacher, student and fake score have the files'
changes, and guidance has them in both of its branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from teachers.adapters.files import LoRAFile, Pair, check, read
from teachers.errors import UserError, note
from teachers.storage.packed import decoded
from teachers.storage.variants import WEIGHTS, variant_of


@dataclass(frozen=True)
class Fusion:
    """LoRA files that are part of a teacher's weights.

    files: In an order of their content, so that sums do not depend on the order in a recipe.
    """

    files: tuple[LoRAFile, ...]

    def contents(self) -> list[dict[str, Any]]:
        """The name, hash and strength of each file."""
        return [
            {"file": f.path.name, "sha256": f.sha256, "strength": f.strength} for f in self.files
        ]

    def parts(self) -> set[str]:
        """The components whose weights the files change."""
        return {pair.part for file in self.files if file.strength for pair in file.pairs}

    def changes(self, part: str) -> dict[str, list[Pair]]:
        """By module of a component, all pairs that change it; strengths are in their scales."""
        found: dict[str, list[Pair]] = {}
        for file in self.files:
            for pair in file.pairs if file.strength else ():
                if pair.part == part:
                    scale = pair.scale * file.strength
                    scaled = Pair(part, pair.module, pair.down, pair.up, scale)
                    found.setdefault(pair.module, []).append(scaled)
        return found

    @torch.no_grad()
    def apply(self, part: str, network: nn.Module, folder: Path | None = None) -> float:
        """Add the changes to a component's weights in float32, and round to their own type.

        Args:
            folder: The component's, whose weights may be of higher precision than the network's.

        Returns:
            The norm of all changes over the norm of the weights that they change.
        """
        change = weights = 0.0
        files = {} if folder is None else stored(folder)
        for module, pairs in self.changes(part).items():
            weight = network.get_submodule(module).weight
            assert isinstance(weight, Tensor)
            base = _in_file(files, f"{module}.weight", weight).float()
            delta = sum((pair.delta() for pair in pairs[1:]), pairs[0].delta()).to(base.device)
            change += float(delta.square().sum())
            weights += float(base.square().sum())
            changed = (base + delta).to(weight.dtype)
            if not changed.isfinite().all():
                raise UserError(
                    f"teacher.adapters: {part}.{module}.weight is no longer finite with these "
                    "files; check their strengths, and the base's weights"
                )
            weight.copy_(changed)
        return (change / weights) ** 0.5 if weights else 0.0


def fuse(pipe: Any, network: str, adapters: Iterable[Any], folder: Path | None) -> Fusion | None:
    """Add LoRA files to the weights of a pipeline's network and text encoders; None without files.

    Prints for each file how many of its pairs were added.

    Args:
        network: The component that is the denoiser; it is not quantised yet.
        adapters: As `check` takes them.
        folder: The pipeline's; None if its weights come from elsewhere.

    Raises:
        UserError: a file is missing, of an unknown format or for another base, or fits in part.
    """
    entries = check(adapters)
    if not entries:
        return None
    networks = {
        name: part
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and (name == network or name.startswith("text_encoder"))
    }
    files = [
        read(path, key, strength, network, networks, type(pipe)) for key, path, strength in entries
    ]
    fusion = Fusion(tuple(sorted(files, key=lambda f: (f.sha256, f.strength))))
    shares = [fusion.apply(p, networks[p], folder and folder / p) for p in sorted(fusion.parts())]
    for number, file in enumerate(files):
        if any(other.sha256 == file.sha256 for other in files[:number]):
            note(f"{file.key}: {file.path.name} is in the list twice, and its strengths add up")
        note(f"{file.path.name}: {file.count} of {file.count} pairs, strength {file.strength:g}")
    if shares:
        note(f"teacher.adapters: they change the weights by {max(shares):.2g} of their norm")
    return fusion


def stored(folder: Path) -> dict[str, Path]:
    """The file that each weight of a component is read from."""
    files = {p: match["variant"] for p in folder.iterdir() if (match := WEIGHTS.fullmatch(p.name))}
    variant = variant_of(p.name for p in files)
    found: dict[str, Path] = {}
    for path in sorted(p for p, v in files.items() if v == variant):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _in_file(stored: Mapping[str, Path], name: str, weight: Tensor) -> Tensor:
    """A weight as its file has it, decoded if it is quantised there; or as it is, if not rounded.

    Args:
        stored: The file of each stored tensor; empty if there are none.
    """
    if name not in stored or weight.dtype == torch.float32:
        return weight
    codes = (f"{name}.", f"{name.removesuffix('weight')}SCB")  # what bitsandbytes has beside it
    tensors = {}
    for key in [name, *(k for k in stored if k.startswith(codes))]:
        with safe_open(stored[key], "pt") as file:
            tensors[key] = file.get_tensor(key)
    whole = decoded(tensors, torch.float32)[name]
    return whole.to(weight.device).view(weight.shape)
