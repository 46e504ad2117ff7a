"""Qwen-Image-Edit (arXiv:2508.02324): the picture is read as tokens, and by the text encoder."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from teachers.conditions import NEGATIVE, PICTURE, Pictured
from teachers.errors import UserError
from teachers.families.base import Prompted
from teachers.families.qwen import TOKENS, QwenImage

AREA = 1024 * 1024  # pixels to which the stock pipeline resizes pictures, whatever samples it makes


class QwenImageEdit(QwenImage):
    """Qwen-Image's network; Qwen2.5-VL reads the picture before the prompt, and the negative one.

    The negative prompt's encoding depends on the picture, so each condition has its own.
    """

    PIPELINES = ("QwenImageEditPipeline",)
    PICTURES = "edit"

    def image(self, x_t: Tensor, cond: dict[str, Any]) -> tuple[Tensor, list[tuple[int, int, int]]]:
        tokens, shapes = super().image(x_t, cond)
        picture, more = super().image(cond[PICTURE].to(x_t), cond)
        return torch.cat([tokens, picture], 1), [*shapes, *more]

    @staticmethod
    def embed(pipe: Any, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Tensor]:
        return {}  # the texts are read with the pictures

    @classmethod
    def embed_pictures(cls, codec: Prompted, prompts: list[Pictured]) -> dict[str, Tensor]:
        pipe, images = codec.pipe, resized(prompts)
        latents = [codec.encode(pipe.image_processor.preprocess(image)) for image in images]
        texts = entries(pipe, [p.text for p in prompts], images)
        negative = entries(pipe, [str(codec.negative)] * len(prompts), images)
        own = {f"{NEGATIVE}{k}": v for k, v in negative.items()}
        return {**texts, **own, PICTURE: torch.cat(latents)}

    @classmethod
    def picture_arguments(cls, prompts: list[Pictured]) -> dict[str, Any]:
        return {"image": resized(prompts)}


def resized(prompts: list[Pictured]) -> list[Any]:
    """The prompts' pictures as images of about AREA pixels, as the stock pipeline resizes one."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as stock

    images: list[Any] = []
    for prompt in prompts:
        pixels = ((prompt.picture + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        image = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
        width, height, _ = stock.calculate_dimensions(AREA, image.width / image.height)
        images.append(image.resize((width, height), Image.Resampling.LANCZOS))
    return images


def entries(pipe: Any, texts: list[str], images: list[Any]) -> dict[str, Tensor]:
    """Texts read with their pictures, as entries of one length: the picture's, and TOKENS of text.

    Raises:
        UserError: a text is longer.
    """
    device = pipe.text_encoder.device
    text, mask = pipe.encode_prompt(texts, images, device)
    mask = text.new_ones(text.shape[:2]).long() if mask is None else mask  # None: no padding
    empty = pipe.processor(text=[pipe.prompt_template_encode.format("")], images=images[:1])
    bare = len(empty["input_ids"][0]) - pipe.prompt_template_encode_start_idx
    left = bare + TOKENS - text.shape[1]
    if left < 0:
        long = texts[int(mask.sum(1).argmax())]
        raise UserError(f"prompt {long[:60]!r}: longer than {TOKENS} tokens; shorten it")
    return {"text": pad(text.float(), (0, 0, 0, left)), "mask": pad(mask, (0, left))}
