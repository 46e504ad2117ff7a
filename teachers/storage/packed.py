"""Quantised weights: bitsandbytes', in folders and in files, and ComfyUI's scaled fp8, in files.

| form | a weight | scales |
|---|---|---|
| 4 bits (arXiv:2305.14314) | one of 16 levels, nf4's or fp4's; two to a byte, the first higher | one for each 64 weights or so; they may be codes of 8 bits themselves |
| 8 bits (arXiv:2208.07339) | an integer from -127 to 127 | one for each output: its largest weight |
| scaled fp8 | e4m3 or e5m2 | one for the layer |

They are decoded when a component is loaded, exactly and without bitsandbytes, which needs a GPU for
it. From then on they are ordinary weights, and `teacher.precision` says how the network holds them.
"""  # noqa: E501

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from teachers.errors import UserError, clipped, note
from teachers.storage.variants import WEIGHTS

KEY = "quantization_config"  # of config.json
STATE = ".quant_state.bitsandbytes__"  # before the form, in the name of a weight's settings
# The ends of names that belong to a weight's codes.
SCALES = re.compile(
    r"(^|\.)(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format"
    r"|scale_weight|weight_scale|scale_input|input_scale|comfy_quant|scaled_fp8)$"
)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def form(config: Mapping[str, Any], who: str, where: Path) -> str | None:
    """The form of a component's weights by its config.json, in words; None for ordinary weights.

    Raises:
        UserError: another program quantised them.
    """
    settings = config.get(KEY)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else settings
    if method != "bitsandbytes":
        raise UserError(
            f"{who}: {where}: its weights are quantised by {clipped(method)}, and only those of "
            "bitsandbytes are read; give fp32, bf16 or fp16 weights"
        )
    if settings.get("load_in_8bit"):
        return "8 bits"
    return str(settings.get("bnb_4bit_quant_type", "fp4"))


def load(kind: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """A component with decoded weights, and the names that its file lacks, or has too many.

    Args:
        kind: A diffusers or transformers class.
        variant: Of the weights' files.
        dtype: Of all floating-point weights.
    """
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.iterdir()):
        if (match := WEIGHTS.fullmatch(file.name)) and match["variant"] == variant:
            weights |= load_file(file)
    kept = getattr(kind, "_keep_in_fp32_modules", None) or () if dtype == torch.float16 else ()
    state = {
        k: v.float() if set(k.split(".")) & set(kept) else v
        for k, v in decoded(weights, dtype).items()
    }
    if not hasattr(kind, "from_config"):  # of transformers
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
        delattr(config, KEY)
        words = {"config": config, "state_dict": state, "torch_dtype": dtype}
        return kind.from_pretrained(None, output_loading_info=True, **words)
    from accelerate import init_empty_weights

    config = {k: v for k, v in kind.load_config(folder, local_files_only=True).items() if k != KEY}
    with init_empty_weights(include_buffers=False):
        made = kind.from_config(config)
    shapes = {k: v.shape for k, v in made.state_dict().items()}
    wrong = [k for k, v in state.items() if k in shapes and v.shape != shapes[k]]
    found = made.load_state_dict(
        {k: v for k, v in state.items() if k not in wrong}, strict=False, assign=True
    )
    lacking = [k for k in found.missing_keys if k not in wrong]
    info = {"missing_keys": lacking, "unexpected_keys": found.unexpected_keys}
    return made.eval(), {**info, "mismatched_keys": wrong}


def is_scale(name: str) -> bool:
    """Whether a stored tensor belongs to a weight's codes."""
    return STATE in name or SCALES.search(name) is not None


def decoded(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that stored tensors stand for, by name, as `dtype`; integers are kept.

    Raises:
        KeyError: a weight's scales are not there.
    """
    states = {name.partition(STATE)[0]: name for name in weights if STATE in name}
    result = {}
    for name, value in weights.items():
        if is_scale(name):
            continue
        if name in states:
            value = four_bits(weights, name, json.loads(bytes(weights[states[name]].tolist())))
        elif value.dtype == torch.int8:
            scales = weights[f"{name.removesuffix('weight')}SCB"]
            value = value.float() * (scales.float() / 127).view(-1, 1)
        elif value.dtype in FP8:
            stem = name.removesuffix("weight")
            scale = weights.get(f"{stem}scale_weight", weights.get(f"{stem}weight_scale"))
            value = value.float() * (1 if scale is None else scale.float())
        result[name] = value.to(dtype) if value.is_floating_point() else value
    return result


def four_bits(weights: Mapping[str, Tensor], name: str, state: dict[str, Any]) -> Tensor:
    """A weight in float32, of its codes in `weights` and their settings."""
    scales = weights[f"{name}.absmax"]
    if "nested_blocksize" in state:
        levels, absmax = (weights[f"{name}.nested_{k}"] for k in ("quant_map", "absmax"))
        coarse = absmax.repeat_interleave(state["nested_blocksize"])[: len(scales)]
        scales = levels[scales.long()] * coarse + state["nested_offset"]
    codes, levels = weights[name].flatten(), weights[f"{name}.quant_map"].float()
    values = levels[torch.stack([codes >> 4, codes & 15], 1).flatten().long()]
    size = int(torch.Size(state["shape"]).numel())
    scales = scales.float().repeat_interleave(state["blocksize"])[:size]
    return (values[:size] * scales).view(*state["shape"])


@cache
def say(form: str, part: str, who: str) -> None:
    """Tell that a component's weights are decoded; once, as a run reads its teacher again."""
    remedy = "; teacher.precision: nf4 keeps its codes" * (form == "nf4" and part in NETWORKS)
    note(f"{who}: {part or 'its network'} is in bitsandbytes' {form}, and is decoded{remedy}")


NETWORKS = ("", "transformer", "unet")
