"""LoRA files read: the keys of every common origin as pairs of factors of a pipeline's layers."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, cat, nn

from teachers.adapters.names import Place, places, split
from teachers.errors import WORD, UserError, clipped, cut, first_line
from teachers.storage.components import quiet
from teachers.storage.files import home, read_json

WEIGHT = re.compile(
    r"(?P<name>.+?)\.(?:(?P<down>lora_A(?:\.[^.]+)?|lora_down|lora\.down|lora_linear_layer\.down"
    r"|down)|(?:lora_B(?:\.[^.]+)?|lora_up|lora\.up|lora_linear_layer\.up|up))\.weight"
)
ALPHA = re.compile(r"(?P<name>.+?)(?:\.lora|\.lora_linear_layer)?\.alpha")
MARK = re.compile(r"lora[._]|hada_|lokr_")  # in most names of such a file, and in no model's
METADATA = "lora_adapter_metadata"  # of the header: PEFT's settings, under which diffusers saves
SHOWN = 3  # keys that a message names


@dataclass(frozen=True)
class Pair:
    """The two factors of a layer's change, scale · up · down.

    down: (rank, in, …), in the layout of the layer's weight.
    up: (out, rank, 1, …).
    scale: alpha / rank.
    """

    part: str
    module: str
    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        """The change (out, in, …), in float32."""
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return (product * self.scale).view(len(product), *self.down.shape[1:])


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA file, fitted to a pipeline.

    key: Of the recipe, such as "teacher.adapters.0.file".
    sha256: Of the file.
    pairs: Of the pipeline's layers; more than `count` where one of the file's layers is several.
    count: How many pairs of factors the file holds.
    """

    path: Path
    key: str
    strength: float
    sha256: str
    pairs: tuple[Pair, ...]
    count: int


@dataclass
class Raw:
    """A layer of a file: its tensors as they are."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    key: str = ""
    again: str = ""  # a key that is a second factor of the same side


def check(adapters: Any) -> list[tuple[str, Path, float]]:
    """The key, the path and the strength of each entry; files are looked up, and not read.

    Args:
        adapters: A list of {"file": …, "strength": …}; the strength is 1 where it is left out.

    Raises:
        UserError: an entry is malformed, a file is missing, or a strength is not finite.
    """
    entries = []
    for number, entry in enumerate(adapters):
        key = f"teacher.adapters.{number}"
        if not isinstance(entry, Mapping) or "file" not in entry or entry.keys() - {
            "file", "strength"
        }:  # fmt: skip
            raise UserError(f"{key}: expected a file and its strength; write {{file: PATH}}")
        strength = entry.get("strength", 1.0)
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise UserError(f"{key}.strength: expected a number, not {clipped(strength)}; use 1.0")
        if not math.isfinite(strength):
            raise UserError(f"{key}.strength: {strength} is not finite; give a number such as 1.0")
        path = home(entry["file"], f"{key}.file")
        if not path.is_file():
            where = "" if path.is_absolute() else f" in {Path.cwd()}"
            raise UserError(
                f"{key}.file: no such file: {clipped(path)}{where}; give a .safetensors file"
            )
        entries.append((f"{key}.file", path, float(strength)))
    return entries


def is_lora(names: Iterable[str]) -> bool:
    """Whether the names of a file's weights are those of a LoRA, a LoHa or a LoKr."""
    names = list(names)
    return 2 * sum(bool(MARK.search(name)) for name in names) > len(names)


def read(
    path: Path,
    key: str,
    strength: float,
    network: str,
    networks: Mapping[str, nn.Module],
    pipeline: type | None = None,
) -> LoRAFile:
    """Read a LoRA file and fit it to a pipeline.

    Args:
        network: The component that is the denoiser.
        networks: The denoiser and the text encoders, by component.
        pipeline: The pipeline's class, whose own converter is tried for names unknown here.

    Raises:
        UserError: the file is of an unknown format, for another network, or only a part of it fits.
    """
    where = f"{key}: {clipped(path.name)}"
    tensors, settings = _content(path, where)
    layers, strange = _layers(tensors)
    if not layers:
        first = clipped(min(tensors, default="none"))
        kind = next((v for k, v in REFUSED.items() if k in first), "no down and up matrices")
        raise UserError(
            f"{where} is in no LoRA format that is known: it holds {kind} (first key: {first}); "
            "give a plain LoRA"
        )
    check_factors(layers, where)
    half = [raw.key for raw in layers.values() if raw.down is None or raw.up is None]
    count, known = len(layers), {part: places(part, module) for part, module in networks.items()}

    def place_of(name: str) -> tuple[str, str, Place | None]:
        part, rest = split(name, network, set(networks) - {network})
        return part, rest, known.get(part, {}).get(rest.replace(".", "_"))

    if not half and any(place_of(name)[2] is None for name in layers):
        layers, strange = _converted(pipeline, tensors, len(layers)) or (layers, strange)
    pairs: list[Pair] = []
    names: dict[tuple[str, str], str] = {}  # in the file, of the modules here
    for name, raw in layers.items():
        if raw.down is None or raw.up is None:
            continue
        part, rest, place = place_of(name)
        if place is None:
            strange.append(raw.key)
            continue
        for module in place.modules:
            if (other := names.setdefault((part, module), name)) != name:
                raise UserError(
                    f"{where}: {clipped(other)} and {clipped(name)} are one layer of this model, "
                    f"{module}; give a file with one of them"
                )
        scale = _scale(raw, part, rest, settings, where)
        pairs += _fitted(raw, part, place, scale, networks[part], where)
    if strange or half:
        fit = len(layers) - len(half) - sum(WEIGHT.fullmatch(k) is not None for k in strange)
        raise UserError(
            f"{where}: {fit} of {len(layers)} pairs fit; {_unfit(half, strange)}; give a plain "
            "LoRA of this base, with all its keys"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return LoRAFile(path, key, strength, digest, tuple(pairs), count)


def _converted(
    pipeline: Any, tensors: Mapping[str, Tensor], count: int
) -> tuple[dict[str, Raw], list[str]] | None:
    """The layers of a file that a pipeline's own converter renames; None if it cannot."""
    if not hasattr(pipeline, "lora_state_dict"):
        return None
    try:
        with quiet():
            found = pipeline.lora_state_dict(dict(tensors))
    except Exception:  # whatever a converter comes to on a file of another family
        return None
    state = found[0] if isinstance(found, tuple) else found
    if isinstance(found, tuple) and found[1]:  # alphas by names of its own
        return None
    layers, strange = _layers(state)
    return (layers, strange) if len(layers) >= count and not strange else None


def _unfit(half: list[str], strange: list[str]) -> str:
    """What does not fit of a file, for a message: the kind of the keys, and the first of them."""
    keys = sorted(strange) or sorted(half)
    fault = "keys of no layer of this model" if strange else "keys without their counterpart"
    fault = next((v for part, v in REFUSED.items() if strange and part in keys[0]), fault)
    shown = ", ".join(cut(k, WORD) for k in keys[:SHOWN])
    rest = f", and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{fault}: {shown}{rest}"


REFUSED = {  # what a part of a key means that cannot be read here
    "dora_scale": "keys of a DoRA",
    "magnitude": "keys of a DoRA",
    "hada_": "keys of a LoHa",
    "lokr_": "keys of a LoKr",
    "lora_mid": "keys of a Tucker decomposition",
    ".diff": "changes of full rank",
    ".set_weight": "replaced weights",
    "bias": "changes of biases",
}


def _content(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors and PEFT's settings, from its header or from the file beside it."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{where} cannot be read as safetensors ({first_line(error)}); give a .safetensors file"
        ) from None
    beside = path.with_name("adapter_config.json")
    if path.name.startswith("adapter_model") and beside.is_file():
        return tensors, read_json(beside, where)
    try:
        settings = json.loads(header.get(METADATA, "{}"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{where}: {METADATA} in its header is no JSON object; save the file again")
    return tensors, settings


def check_factors(layers: Mapping[str, Raw], where: str) -> None:
    """Refuse tensors that are no pair of factors: several, of other shapes, or not finite.

    Raises:
        UserError: it names the first of them.
    """
    for raw in layers.values():
        if raw.again:
            raise UserError(
                f"{where}: {cut(raw.again, WORD)} is a second factor of one layer, as of two "
                "adapters in one file; give a file of one"
            )
        for value in (raw.down, raw.up):
            if value is None:
                continue
            if value.ndim < 2 or not value.numel():
                shape = "×".join(map(str, value.shape)) or "one number"
                fault = f"{cut(raw.key, WORD)} is of {shape}, and a LoRA's factors are matrices"
            elif not value.float().isfinite().all():
                fault = f"{cut(raw.key, WORD)} holds NaN or infinity"
            else:
                continue
            raise UserError(f"{where}: {fault}; download or train it again")
        if raw.alpha is not None and not math.isfinite(raw.alpha):
            raise UserError(
                f"{where}: the alpha of {cut(raw.key, WORD)} is no finite number; download or "
                "train it again"
            )


def _layers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Raw], list[str]]:
    """The layers that a file changes, by its own names, and the keys that are of no such pair."""
    layers: dict[str, Raw] = {}
    strange, alphas = [], {}
    for key, value in tensors.items():
        if match := WEIGHT.fullmatch(key):
            raw = layers.setdefault(match["name"], Raw())
            raw.key = raw.key or key
            side = "down" if match["down"] else "up"
            raw.again = raw.again if getattr(raw, side) is None else key
            setattr(raw, side, value)
        elif match := ALPHA.fullmatch(key):
            alphas[match["name"]] = key
        else:
            strange.append(key)
    for name, key in alphas.items():
        if name in layers:
            value = tensors[key]
            layers[name].alpha = value.item() if value.numel() == 1 else math.nan
        else:
            strange.append(key)
    return layers, strange


def _scale(raw: Raw, part: str, name: str, settings: Mapping[str, Any], where: str) -> float:
    """What up · down is multiplied by: alpha / rank.

    Alpha is the file's own tensor, or in PEFT's settings, or else the rank.
    """
    assert raw.down is not None
    rank = len(raw.down)
    prefix = f"{part}."
    mine = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
    mine = mine or ({} if any("." in k for k in settings) else dict(settings))
    if mine.get("use_dora"):
        raise UserError(f"{where} is a DoRA, which is no low-rank change alone; give a plain LoRA")
    if raw.alpha is not None:
        return raw.alpha / rank
    try:
        alpha = _matched(mine.get("alpha_pattern"), name, mine.get("lora_alpha"))
        if alpha is not None and not math.isfinite(alpha):
            raise ValueError(alpha)
    except (ValueError, TypeError, AttributeError, re.error):
        raise UserError(
            f"{where}: lora_alpha or alpha_pattern in its settings is no number or no pattern; "
            "save the file again"
        ) from None
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if mine.get("use_rslora") else rank)


def _matched(patterns: Any, name: str, default: Any) -> float | None:
    """PEFT's value of a layer: that of the first pattern which ends its name, or the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(value)
    return None if default is None else float(default)


def _fitted(
    raw: Raw, part: str, place: Place, scale: float, network: nn.Module, where: str
) -> list[Pair]:
    """The pairs of the modules that a layer of the file is, in the layout of their weights.

    Raises:
        UserError: the factors are of other sizes than the layers.
    """
    down, up = raw.down, raw.up
    assert down is not None and up is not None
    weights: list[Any] = [network.get_submodule(m).weight for m in place.modules]
    rows = [len(w) for w in weights]
    rank, inner = len(down), {tuple(w.shape[1:]) for w in weights}
    sizes = {math.prod(s) for s in inner}
    if up.numel() != sum(rows) * rank or sizes != {down[0].numel()} or len(up) != sum(rows):
        theirs = f"{down[0].numel()} → {len(up)} of rank {rank}"
        raise UserError(
            f"{where}: {cut(raw.key, WORD)} is {theirs}; {place.modules[0]} of this model is "
            f"{min(sizes)} → {sum(rows)}; give a LoRA of this base"
        )
    if place.swapped:
        up = cat([*reversed(up.chunk(2))])
    pairs = []
    for module, weight, piece in zip(place.modules, weights, up.split(rows), strict=True):
        ones = (1,) * (weight.ndim - 2)
        shaped = down.reshape(rank, *weight.shape[1:])
        pairs.append(Pair(part, module, shaped, piece.reshape(len(piece), rank, *ones), scale))
    return pairs
