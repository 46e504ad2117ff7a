"""Rename the tensors of EDM and EDM2 pickles to our networks' names."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

# Pickled names to ours, applied in order; None: dropped, because the arguments determine it.
EDM_NAMES = [
    (r".*resample_filter$", None),
    (r"^model\.map_augment\.weight$", None),
    (r"^model\.map_noise\.freqs$", "frequencies"),
    (r"^model\.map_label\.", "label."),
    (r"^model\.map_layer0\.", "mlp.0."),
    (r"^model\.map_layer1\.", "mlp.2."),
    (r"^model\.enc\.(\d+)x\d+_conv\.", "stem."),
    (r"^model\.enc\.(\d+)x\d+_aux_(?:residual|skip)\.", r"encoder.\1.side.conv."),
    (r"^model\.dec\.(\d+)x\d+_aux_(norm|conv)\.", r"heads.\1.\2."),
    (r"^model\.out_(norm|conv)\.", r"heads.{img_resolution}.\1."),
    (r"^model\.enc\.(\d+)x\d+_", r"encoder.\1."),
    (r"^model\.dec\.(\d+)x\d+_", r"decoder.\1."),
    (r"\.(?:down|up)\.", ".resize."),
    (r"\.in(\d)\.", r".middle.\1."),
    (r"\.block(\d+)\.", r".blocks.\1."),
    (r"\.norm0\.", ".norm_in."),
    (r"\.conv0\.", ".conv_in."),
    (r"\.affine\.", ".embed."),
    (r"\.norm1\.", ".norm_out."),
    (r"\.conv1\.", ".conv_out."),
    (r"\.norm2\.", ".attention.norm."),
    (r"\.qkv\.", ".attention.qkv."),
    (r"\.proj\.", ".attention.out."),
]
EDM2_NAMES = [
    (r"^logvar_fourier\.freqs$", "uncertainty.noise.frequencies"),
    (r"^logvar_fourier\.phases$", "uncertainty.noise.phases"),
    (r"^logvar_linear\.", "uncertainty.linear."),
    (r"^unet\.emb_fourier\.freqs$", "noise.frequencies"),
    (r"^unet\.emb_fourier\.phases$", "noise.phases"),
    (r"^unet\.emb_noise\.", "time."),
    (r"^unet\.emb_label\.", "label."),
    (r"^unet\.out_conv\.", "out."),
    (r"^unet\.out_gain$", "gain"),
    (r"^unet\.enc\.(\d+)x\d+_conv\.", "stem."),
    (r"^unet\.enc\.(\d+)x\d+_", r"encoder.\1."),
    (r"^unet\.dec\.(\d+)x\d+_", r"decoder.\1."),
    (r"\.(?:down|up)\.", ".resize."),
    (r"\.in(\d)\.", r".middle.\1."),
    (r"\.block(\d+)\.", r".blocks.\1."),
    (r"\.conv_skip\.", ".skip."),
    (r"\.conv_res0\.", ".conv_in."),
    (r"\.conv_res1\.", ".conv_out."),
    (r"\.emb_linear\.", ".embed."),
    (r"\.emb_gain$", ".gain"),
    (r"\.attn_qkv\.", ".attention.qkv."),
    (r"\.attn_proj\.", ".attention.out."),
]


def renamed(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors by our networks' names; unknown names are kept, and refused when loaded."""
    rules = EDM_NAMES if config["_class_name"] == "EDMPrecond" else EDM2_NAMES
    size = str(config["arguments"]["img_resolution"])
    ours = {}
    for name, tensor in weights.items():
        new: str | None = name
        for pattern, to in rules:
            if re.search(pattern, new):
                new = None if to is None else re.sub(pattern, to, new)
            if new is None:
                break
        if new is not None:
            ours[new.replace("{img_resolution}", size)] = tensor
    return ours
