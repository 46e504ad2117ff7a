"""AuraFlow: joint and single transformer blocks on the plain latents of SDXL's VAE."""

from __future__ import annotations

from typing import Any

from teachers.pipelines.generic import Generic


class AuraFlow(Generic):
    """An AuraFlowTransformer2DModel; reads 256 tokens of UMT5, whose padding is zero."""

    PIPELINES = ("AuraFlowPipeline",)
    ENCODED, LENGTH = {"encoder_hidden_states": 0}, 256
    PIXELS = 1024
    TIME = r"time_step_proj\.linear_2"
    LORA = (
        r".*(attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
        r"|ff(_context)?\.(linear_1|linear_2|out_projection))"
    )

    @staticmethod
    def kept(pipe: Any, limit: int) -> int:
        return min(limit, 256)
