"""Components of a folder with their linear layers quantised as bitsandbytes saves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teachers.quantised import NF4, encode

FP4 = (0.0, 0.005208333, 0.6666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
LEVELS = {"nf4": NF4, "fp4": (*FP4, *(-v for v in FP4))}
State = dict[str, Tensor]


def four_bits(name: str, weight: Tensor, form: str, nested: bool) -> State:
    """The stored tensors of a weight in blocks of 64."""
    levels = torch.tensor(LEVELS[form])
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scales = blocks.abs().amax(1).clamp(min=1e-12)
    codes = (blocks / scales[:, None]).flatten()[:, None].sub(levels).abs().argmin(1)
    if form == "nf4":
        bytes_, _ = encode(weight, "nf4")
    else:
        bytes_ = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)
    settings = {"quant_type": form, "blocksize": 64, "dtype": "bfloat16"}
    settings |= {"shape": list(weight.shape)}
    made = {name: bytes_.view(-1, 1)[: -(-weight.numel() // 2)], f"{name}.quant_map": levels}
    if nested:
        offset, coarse = scales.mean(), (scales - scales.mean()).abs().max()
        table = torch.linspace(-1, 1, 256)
        fine = ((scales - offset) / coarse)[:, None].sub(table).abs().argmin(1).to(torch.uint8)
        made |= {f"{name}.absmax": fine, f"{name}.nested_quant_map": table}
        made |= {f"{name}.nested_absmax": coarse.view(1)}
        settings |= {"nested_blocksize": 256 * len(scales), "nested_dtype": "float32"}
        settings |= {"nested_offset": float(offset)}
    else:
        made[f"{name}.absmax"] = scales
    text = json.dumps(settings).encode()
    made[f"{name}.quant_state.bitsandbytes__{form}"] = torch.tensor(list(text), dtype=torch.uint8)
    return made


def eight_bits(name: str, weight: Tensor) -> State:
    scales = weight.abs().amax(1)
    codes = (weight / scales[:, None] * 127).round().to(torch.int8)
    stem = name.removesuffix("weight")
    return {name: codes, f"{stem}SCB": scales, f"{stem}weight_format": torch.tensor(0).byte()}


def pack(folder: Path, form: str, nested: bool = False) -> None:
    """Quantise the weights of a component's linear layers, in its only file.

    Args:
        form: "nf4", "fp4" or "8 bits".
    """
    file = next(folder.glob("*.safetensors"))
    made: State = {}
    for name, weight in load_file(file).items():
        linear = weight.ndim == 2 and not any(k in name for k in ("embed", "shared", "pos_"))
        if not linear or not name.endswith("weight"):
            made[name] = weight
        elif form == "8 bits":
            made |= eight_bits(name, weight)
        else:
            made |= four_bits(name, weight, form, nested)
    save_file({k: v.contiguous() for k, v in made.items()}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": form != "8 bits"}
    settings |= {"load_in_8bit": form == "8 bits", "bnb_4bit_quant_type": form}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
