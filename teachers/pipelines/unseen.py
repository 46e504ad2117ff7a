"""Pipelines that no family names: the adapter is declared by `reading.py`, from a run of theirs."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from teachers.errors import UserError, note
from teachers.families import base
from teachers.families.base import Pretrained
from teachers.pipelines.generic import Cells, Generic
from teachers.pipelines.reading import listed, read_pipeline, refusal, same
from teachers.pipelines.recording import Recording


class Unseen(Generic):
    """A network whose pipeline is read by `reading`; of one size, which is that of the reading."""

    SQUARE = True
    FIXED: ClassVar[dict[str, Any]] = {}  # arguments that are always the same
    EACH: ClassVar[dict[str, Any]] = {}  # and those with a row (1, ...) for each sample
    CALL: ClassVar[dict[str, Any]] = {}  # what encode_prompt is called with beside the prompts
    PROMPT: ClassVar[str] = "prompt"  # the argument that is the prompts
    UNGUIDED_CALL: ClassVar[dict[str, Any]] = {}  # the pipeline's, by which it does not guide
    PER_CELL: ClassVar[int] = 8  # pixels per latent cell
    SHAPE: ClassVar[tuple[int, ...]] = ()
    SHIFT: ClassVar[float | None] = None  # the pipeline's own, where it depends on the size

    @classmethod
    def of(cls, pipe: Any, size: int | None, who: str) -> type[Pretrained]:
        place = f"{who}: {type(pipe).__name__}"
        layout, found, recording = read_pipeline(pipe, cls.PART, size, place)
        kinds = [
            type(cls.__name__, bases, found) for bases in ((layout, cls), (Cells, layout, cls))
        ]
        forms = [(kind, framed) for kind in kinds for framed in (False, True)]
        kind = next((k for k, framed in forms if decodes(k, framed, pipe, recording)), None)
        if kind is None:
            fault = "what its VAE decodes is not (latents - shift) · scale by the VAE's config"
            raise refusal(place, fault)
        note(
            f"{who}: no family names {type(pipe).__name__}; what it feeds its network was read "
            "from a run of it. Check it with distill doctor, on pictures of its kind"
        )
        return kind

    def told(self, tokens: Tensor, cond: dict[str, Any], x_t: Tensor) -> dict[str, Any]:
        if tuple(x_t.shape[1:]) != self.SHAPE:
            raise UserError(
                f"data.size: latents of {tuple(x_t.shape[1:])}, but this pipeline was read with "
                f"{self.SHAPE}; train on pictures of the teacher's size"
            )
        each = {k: self._like(v, x_t).expand(len(x_t), *v.shape[1:]) for k, v in self.EACH.items()}
        fixed = {k: self._like(v, x_t) for k, v in self.FIXED.items()}
        return {**super().told(tokens, cond, x_t), **each, **fixed}

    def _like(self, value: Any, x_t: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(x_t.device, self.dtype if value.is_floating_point() else value.dtype)

    @classmethod
    def encodings(cls, pipe: Any, prompts: list[Any], **more: Any) -> Any:
        given = {**cls.CALL, cls.PROMPT: [*prompts]}
        if "device" in given:
            given["device"] = pipe.text_encoder.device
        return listed(pipe.encode_prompt(**given))

    @classmethod
    def factor(cls, pipe: Any) -> int:
        return cls.PER_CELL

    @classmethod
    def arguments(cls, prompts: list[Any], size: tuple[int, ...]) -> dict[str, Any]:
        return {**cls.UNGUIDED_CALL, "prompt": prompts, "height": size[0], "width": size[1]}

    @classmethod
    def shape(cls, pipe: Any, size: int | None) -> tuple[int, ...]:
        return cls.SHAPE

    @classmethod
    def configured(cls, config: dict[str, Any], shape: tuple[int, ...], backbone: Any):
        if cls.SHIFT is None:
            return config
        return {**config, "use_dynamic_shifting": False, "shift": cls.SHIFT}


class UnseenUNet(Unseen):
    """The same for pipelines whose network is a UNet."""

    PART = "unet"

    @property
    def middle(self) -> str:
        return Pretrained.middle.fget(self)  # pyright: ignore[reportOptionalCall]


def decodes(kind: type[Unseen], framed: bool, pipe: Any, recording: Recording) -> bool:
    """Whether this kind's codec hands to the VAE what the pipeline handed to it; sets FRAMED."""
    kind.FRAMED = framed
    latents, given = kind.unpack(recording.steps[-1][3], kind.SHAPE), recording.decoded
    cells = issubclass(kind, Cells)
    if given is None or (cells and not hasattr(pipe.vae, "bn")):
        return False
    codec = base.Prompted(pipe, kind, (1, 1))
    shift, scale = codec.affine(latents)
    mine = kind.uncelled(latents / scale + shift)
    return same(mine.unsqueeze(2) if kind.FRAMED else mine, given)


def loader(pipeline: str, index: dict[str, Any]) -> Any:
    """The loader for a pipeline that diffusers has and no family names; None if there is none.

    Args:
        pipeline: The class that the folder's model_index.json names.
        index: What else it holds.
    """
    import diffusers

    kind = getattr(diffusers, pipeline, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        return None
    parts = [k for k in (UnseenUNet, Unseen) if isinstance(index.get(k.PART), list)]
    return partial(base.load, parts[0]) if len(parts) == 1 else None
