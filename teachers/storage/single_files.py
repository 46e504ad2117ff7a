"""Single files: a whole pipeline's weights, or its network's, under the names of other programs.

Diffusers converts the names, or `original.py` does. What a file does not say, such as the scheduler
and the tokenizers, comes from a diffusers folder of the same family; so do the parts whose weights
it lacks.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from teachers.errors import UserError, clipped, first_line
from teachers.storage import bfl, download, gguf_files, original, packed
from teachers.storage.components import (
    SPARE,
    TOKENIZERS,
    assembled,
    check_vocabulary,
    module,
    more,
    networks,
    quiet,
    silent,
    tokenizer,
    whole_numbers,
)
from teachers.storage.files import home, read_json

# The beginnings of the names of a part's weights, in the files that are there.
HELD: dict[str, tuple[str, ...]] = {
    "unet": ("model.diffusion_model.",),
    "transformer": (
        "model.diffusion_model.", "joint_blocks.", "double_blocks.", "transformer_blocks.",
    ),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": (
        "cond_stage_model.", "conditioner.embedders.0.", "text_encoders.clip_l.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}  # fmt: skip
T5 = "text_encoders.t5xxl."  # T5 is SD 3's third encoder, and FLUX.1's second


def names_of(file: Path, who: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a file's weights.

    Raises:
        UserError: it cannot be read.
    """
    from safetensors import safe_open

    if file.suffix == gguf_files.SUFFIX:
        return gguf_files.names_of(file, who)
    try:
        with safe_open(file, "pt") as content:
            return {k: tuple(content.get_slice(k).get_shape()) for k in content.keys()}  # noqa: SIM118
    except Exception as error:  # damaged files raise several types
        raise UserError(
            f"{who}: {file} cannot be read ({clipped(first_line(error))}); copy it again"
        ) from None


def holds(names: Iterable[str], part: str, kind: str = "") -> bool:
    """Whether a file has the weights of a pipeline's part.

    Args:
        kind: The part's class, where it is known.
    """
    starts = (T5,) if kind == "T5EncoderModel" else HELD.get(part, ())
    return any(name.startswith(starts) for name in names)


def check_plain(names: Iterable[str], file: Path, who: str) -> None:
    """Refuse quantised weights whose scales diffusers would drop: all but FLUX.1's and SD 3's.

    Raises:
        UserError: the file has scales, or integers for weights.
    """
    mine = original.own(names)
    decoded = set(mine) if original.kind_of(mine) is not None else set()
    quantised = [k for k in names if packed.is_scale(k)]
    if file.suffix != gguf_files.SUFFIX:
        parts = (*HELD["unet"], *HELD["transformer"], *HELD["vae"])  # an encoder may have indices
        quantised += [k for k in whole_numbers(file) if k.startswith(parts)]
    if scale := next((k for k in quantised if k not in decoded), None):
        raise UserError(
            f"{who}: {file} holds quantised weights ({clipped(scale)}); give a file in fp32, bf16, "
            "fp16 or plain fp8, and teacher.precision nf4 or fp8 for less memory"
        )


def settings(file: Path, config: str | None, who: str) -> Path:
    """The diffusers folder that says what the file does not.

    Args:
        config: A folder or a Hub id; by default the Hub id of the family that the file is of.

    Raises:
        UserError: the file is of no known family, or the folder is not there.
    """
    names = names_of(file, who)
    source = config or usual(names, file, who)
    folder = home(source, f"{who}: config")
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise UserError(
            f"{who}: config: {clipped(source)} is no folder; give a diffusers folder of the same "
            "family, or a Hub id"
        )
    return download.fetch(source, keep=lambda path: not held_weights(path, names))


def held_weights(path: str, names: Iterable[str]) -> bool:
    """Whether a repository's file holds weights that the single file has too."""
    part = PurePosixPath(path).parent.name
    return ".safetensors" in path and (holds(names, part) or is_fluxs_t5(part, names))


def is_fluxs_t5(part: str, names: Iterable[str]) -> bool:
    """Whether a part is FLUX.1's T5, which a file holds."""
    return part == "text_encoder_2" and bfl.holds(names) and holds(names, part, "T5EncoderModel")


def usual(names: dict[str, tuple[int, ...]], file: Path, who: str) -> str:
    """The Hub id of the pipeline that weights of these names and shapes are of."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    known = any(holds(names, part) for part in ("unet", "transformer"))
    if not known:
        raise UserError(
            f"{who}: {file} holds no network of Stable Diffusion, SDXL, SD3, FLUX, "
            f"SiT, LightningDiT or U-ViT ({clipped(next(iter(names), 'nothing'))}, …); "
            "give another file"
        )
    outline: Any = {k: torch.empty(v, device="meta") for k, v in names.items()}
    return fetch_diffusers_config(outline)["pretrained_model_name_or_path"]


def stock(file: Path, folder: Path, who: str, dtypes: dict[str, torch.dtype]) -> Any:
    """The pipeline of a single file, without a safety checker.

    Args:
        folder: A diffusers folder of the same family.
        dtypes: The dtype of each part's weights; "default" for all others.

    Raises:
        UserError: a part's weights are in neither, or do not match the folder's config.
    """
    import diffusers

    index = read_json(folder / "model_index.json", who)
    parts: dict[str, Any] = dict.fromkeys(k for k in SPARE if absent(folder, index, k))
    names = names_of(file, who)
    check_plain(names, file, who)
    for part, kind in networks(index):
        if part not in parts:
            dtype = dtypes.get(part, dtypes["default"])
            parts |= loaded(kind, part, names, file, folder, dtype, who)
    for part, entry in index.items():
        if isinstance(entry, list) and str(entry[1]).endswith(TOKENIZERS) and part not in parts:
            check_vocabulary(folder / part, who)
            parts[part] = tokenizer(entry[1], folder / part, who)
    if file.suffix == gguf_files.SUFFIX:  # a network alone, which is converted already
        pipe = assembled(folder, index, parts, {}, dtypes, who)
    else:
        words = {"config": str(folder), "torch_dtype": dtypes["default"], **parts}
        pipe = converted(getattr(diffusers, index["_class_name"]), str(file), file, who, words)
    for part, _ in networks(index):
        if (made := getattr(pipe, part, None)) is not None:
            if hasattr(made, "tie_weights"):  # T5's embedding has two names, and files have one
                made.tie_weights()
            check_whole(made, part, file, who)
            made.eval()
    return pipe


def loaded(
    kind: Any,
    part: str,
    names: Iterable[str],
    file: Path,
    folder: Path,
    dtype: torch.dtype,
    who: str,
) -> dict[str, Any]:
    """A part by its name; nothing where the pipeline's own conversion makes it, as of CLIP and T5.

    Args:
        names: Of the file's weights.
    """
    if not holds(names, part, kind.__name__):
        if part in ("unet", "transformer"):
            unread = "; of GGUF, only transformers are read" * (file.suffix == gguf_files.SUFFIX)
            raise UserError(
                f"{who}: config: {file} holds no {part}, which the pipeline in {folder} has{unread}"
                "; give a diffusers folder of the file's own family"
            )
        return {part: beside(kind, folder, part, file, dtype, who)}
    if not hasattr(kind, "from_single_file"):
        return {}
    content = original.network(file, dtype, who) if part == "transformer" else None
    if content is not None:
        check_fits(content, kind, folder / part, file, who)
    words = {"config": str(folder), "subfolder": part, "torch_dtype": dtype}
    return {part: converted(kind, content or str(file), file, who, words)}


def absent(folder: Path, index: dict[str, Any], part: str) -> bool:
    """Whether a part that pipelines can do without is not in the folder."""
    return part in index and not (folder / part).is_dir()


def beside(kind: Any, folder: Path, part: str, file: Path, dtype: torch.dtype, who: str) -> Any:
    """A part that the file lacks, from the folder; None if pipelines can do without it.

    Raises:
        UserError: the folder has no weights of it either.
    """
    if any((folder / part).glob("*.safetensors")):
        return module(kind, folder / part, who, part, torch_dtype=dtype)
    if part in SPARE:
        return None
    raise UserError(
        f"{who}: {file} holds no {part}, and {folder} has no weights of it; give as config a "
        "diffusers folder or Hub id that has them"
    )


def converted(kind: Any, content: Any, file: Path, who: str, words: dict[str, Any]) -> Any:
    """A model or pipeline from a single file, as diffusers converts it.

    Args:
        content: The file's name, or its weights under diffusers' names.
    """
    try:
        with quiet(), silent("diffusers.loaders.single_file_model"):
            return kind.from_single_file(content, local_files_only=True, **words)
    except Exception as error:  # files of another family raise many types
        raise UserError(
            f"{who}: {file} cannot be read as a {kind.__name__} ({clipped(first_line(error), 150)})"
            "; give as config a diffusers folder of its own family"
        ) from None


def check_whole(made: Any, part: str, file: Path, who: str) -> None:
    """Refuse a part whose weights are not all there: diffusers leaves those without values."""
    hollow = sorted(k for k, v in made.state_dict().items() if v.is_meta)
    if hollow:
        raise UserError(
            f"{who}: the weights in {file} are not whole: {part}.{hollow[0]} is missing"
            f"{more(hollow)}; copy it again, or give as config a folder of its own family"
        )


def check_fits(
    content: dict[str, torch.Tensor], kind: Any, part: Path, file: Path, who: str
) -> None:
    """Refuse weights that are not those of the config's network: diffusers drops what it lacks.

    Args:
        content: The network's weights in the file, by diffusers' names.
        part: The folder of the network's config.

    Raises:
        UserError: one is missing, or is of another shape or network.
    """
    with quiet(), torch.device("meta"):
        names = kind.from_config(read_json(part / "config.json", who)).state_dict()
    if extra := sorted(content.keys() - names.keys()):
        fault = f"{file} holds {clipped(extra[0])}{more(extra)}, which its network does not have"
    elif lacking := sorted(names.keys() - content.keys()):
        fault = f"its network has {lacking[0]}{more(lacking)}, which {file} lacks"
    elif wrong := sorted(k for k, v in names.items() if v.shape != content[k].shape):
        shapes = f"{tuple(content[wrong[0]].shape)}, not {tuple(names[wrong[0]].shape)}"
        fault = f"{wrong[0]}{more(wrong)} in {file} is {shapes}"
    else:
        return
    raise UserError(
        f"{who}: config: {part} is of another network: {fault}; give a diffusers folder of the "
        "file's own family"
    )
