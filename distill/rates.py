"""What GPUs can do: their published rates, and the shares of them that training was measured at.

Measurements are in rates.json, which `benchmarks/tables.py` makes of `docs/results/gpu`. It has no
entry for a card on which `benchmarks/gpu.py` was not run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from teachers.errors import plural

FILE = Path(__file__).with_suffix(".json")
BUSY = 0.4  # the share of a GPU's peak FLOP/s that training reaches; assumed where not measured
# By a network's class, the family that benchmarks/gpu.py names; of other classes, the class itself.
FAMILIES = {
    "UNet": "adm", "EDM": "edm", "StableDiffusion": "sd15", "SDXL": "sdxl",
    "StableDiffusion3": "sd3", "PixArtSigma": "pixart",
}  # fmt: skip
ADAPTERS = {"full": "all weights", "lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}


@dataclass(frozen=True)
class Gpu:
    """A card: memory in GB, dense bf16 and fp32 TFLOP/s, and dollars an hour to rent."""

    memory: float
    bf16: float
    fp32: float
    price: float


GPUS = {
    "rtx-3090": Gpu(24, 71, 36, 0.30),
    "rtx-4090": Gpu(24, 165, 83, 0.45),
    "rtx-5090": Gpu(32, 210, 105, 0.70),
    "l40s": Gpu(48, 362, 92, 1.00),
    "a100-40gb": Gpu(40, 312, 19.5, 1.20),
    "a100-80gb": Gpu(80, 312, 19.5, 1.60),
    "h100": Gpu(80, 989, 67, 2.50),
    "h200": Gpu(141, 989, 67, 3.30),
}


@dataclass(frozen=True)
class Share:
    """A share of a card's rate.

    Args:
        value: From 0 to 1.
        tflops: The rate that it is a share of.
        source: Where it comes from; empty where it is assumed.
    """

    value: float
    tflops: float
    source: str = ""


@dataclass(frozen=True)
class Card:
    """What was measured on one device.

    Args:
        device: Its name, as CUDA has it.
        matrix_tflops: The rate of products of large matrices, by precision.
        rows: Of each recipe: name, family, adapter, precision and share of the matrix rate.
    """

    device: str
    matrix_tflops: Mapping[str, float] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()

    def share(self, family: str, adapter: str, kind: str) -> tuple[float, str] | None:
        """The share of the nearest recipe, and which one that is; None if no recipe was measured.

        It is of the same family and the same kind of adapter, or else the mean of all recipes; of
        recipes in the same precision where there are any.

        Args:
            adapter: "full", or an adapter's kind.
            kind: "bf16" or "fp32".
        """
        rows = [r for r in self.rows if kind_of(r["precision"]) == kind] or list(self.rows)
        if not rows:
            return None
        near = [r for r in rows if (r["family"], adapter_of(r)) == (family, adapter)]
        text = f"{family}, {ADAPTERS.get(adapter, adapter)}"
        if not near:
            near, text = rows, f"mean of {len(rows)} other {plural(len(rows), 'recipe')}"
        return sum(r["share"] for r in near) / len(near), text


def family_of(network: Any) -> str:
    """A network's family, as rows name it."""
    name = type(network).__name__
    return FAMILIES.get(name, name.lower())


def adapter_of(row: Mapping[str, Any]) -> str:
    """A row's kind of adapter: "lora" of "lora-64"."""
    return str(row["adapter"]).partition("-")[0].lower()


def kind_of(precision: str) -> str:
    """The precision whose rate products run at: float16 has that of bfloat16."""
    return "fp32" if precision == "fp32" else "bf16"


@cache
def cards(path: Path = FILE) -> tuple[Card, ...]:
    """The measured cards."""
    trees = json.loads(path.read_text(encoding="utf-8"))["cards"]
    return tuple(Card(t["device"], t["matrix_tflops"], tuple(t["rows"])) for t in trees)


def key_of(device: str) -> str | None:
    """The key in GPUS of a device's name, as "NVIDIA H100 80GB HBM3"; None if it is none of them.

    Parts of a card and mobile cards are other devices than those that they are named after.
    """
    words = set(re.split(r"[^a-z0-9]+", device.lower()))
    if words & {"mig", "laptop"}:
        return None
    return next((key for key in GPUS if set(key.split("-")) <= words), None)


def measured(key: str, known: Iterable[Card] | None = None) -> Card | None:
    """The measurements of a card in GPUS."""
    return next((c for c in (cards() if known is None else known) if key_of(c.device) == key), None)


def share_of(key: str, family: str, adapter: str, precision: str) -> Share:
    """The share of a card's rate that training is expected to reach: measured, or else assumed."""
    kind, card = kind_of(precision), measured(key)
    found = card and kind in card.matrix_tflops and card.share(family, adapter, kind)
    if card and found:
        value, text = found
        return Share(value, card.matrix_tflops[kind], f"measured on {card.device} ({text})")
    return Share(BUSY, getattr(GPUS[key], kind))


def rate_of(device: str, precision: str) -> float | None:
    """A device's TFLOP/s: as measured on it, or else as published; None of an unknown one."""
    key, kind = key_of(device), kind_of(precision)
    if key is None:
        return None
    card = measured(key)
    if card is not None and kind in card.matrix_tflops:
        return card.matrix_tflops[kind]
    return getattr(GPUS[key], kind)
