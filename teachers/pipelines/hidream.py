"""HiDream-I1 (arXiv:2505.22705): sparse experts, prompted by two CLIPs, T5 and Llama."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from teachers.errors import UserError
from teachers.pipelines.generic import Generic
from teachers.storage.diffusers_config import dynamic_shift


class HiDream(Generic):
    """A HiDreamImageTransformer2DModel, whose output the pipeline negates.

    The pipeline changes every size to one of its own area, so only its own square is sampled.
    """

    PIPELINES = ("HiDreamImagePipeline",)
    SIGN, SQUARE = -1, True
    CLOCK = ("timesteps", 1.0)
    NAMES: ClassVar = ("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds")
    BLOCKS = r"\w+\.\d+\.block\.attn1"  # experts are chosen on the host, which breaks graphs
    TIME = r"t_embedder\.timestep_embedder\.linear_2"
    LORA = r".*\.attn1\.to_(q|k|v|out)(_t)?"

    def told(self, tokens: Tensor, cond: dict[str, Any], x_t: Tensor) -> dict[str, Any]:
        told = super().told(tokens, cond, x_t)
        layers = told[self.NAMES[1]].transpose(0, 1)  # the network reads (layers, B, tokens, width)
        return {**told, self.NAMES[1]: layers}

    @classmethod
    def embed(cls, pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        t5, _, llama, _, pooled, _ = cls.encodings(pipe, prompts)
        values = (t5.float(), llama.transpose(0, 1).float(), pooled.float())
        return dict(zip(cls.NAMES, values, strict=True))

    @classmethod
    def configured(cls, config: dict[str, Any], shape: tuple[int, ...], backbone: Any):
        if not config.get("use_dynamic_shifting"):
            return config
        usual = {"time_shift_type": config.get("time_shift_type")}  # its own bounds are not read
        shift = dynamic_shift(usual, backbone.max_seq)
        return {**config, "use_dynamic_shifting": False, "shift": shift}

    @classmethod
    def shape(cls, pipe: Any, size: int | None) -> tuple[int, ...]:
        side = pipe.default_sample_size
        only = side * cls.factor(pipe)
        if size not in (None, only):
            raise UserError(f"size: {size}: the pipeline samples {only} pixels only; remove size")
        return (pipe.transformer.config.in_channels, side, side)
