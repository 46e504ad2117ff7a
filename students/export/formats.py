"""A student in the formats of other programs: LoRA files, and single files of all weights.

| file | its keys |
|---|---|
| diffusers LoRA | `unet.….lora_A.weight`, `transformer.….lora_A.weight` |
| kohya LoRA of SD 1.x, 2.x | `lora_unet_down_blocks_0_….lora_down.weight`, `.alpha` |
| kohya LoRA of SDXL | `lora_unet_input_blocks_4_….lora_down.weight`, `.alpha` |
| ComfyUI LoRA of transformers | `diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight` |
| single file of SD 1.x, SDXL | LDM's, such as `model.diffusion_model.input_blocks.…` |

Diffusers reads all of them but the fourth, of which it reads some networks'; ComfyUI the last four.
Kohya's own trainer names SD 1.x by diffusers' blocks and SDXL by LDM's, and so do we: diffusers
0.42 mistakes LDM's input block 1 for 10 and 11, which SDXL does not have, and knows SDXL's added
embedding by LDM's name only. The fourth form is made in `combined.py`.

Every LoRA file is made so that strength 1.0 is the student: W + B A, with kohya's alpha = rank.
All conversions are pure functions on dicts of tensors.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from students.export.folder import (
    PICTURES,
    TOLERANCE,
    ExportError,
    apart,
    child_environment,
    posterior_modes,
)
from students.metadata.check import check_header, finish_header, times_used
from teachers.adapters.ldm import ldm_names
from teachers.errors import UserError
from teachers.storage.files import save_tensors

State = dict[str, Tensor]
LORA = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for


# ---- LoRA


def diffusers_lora(adapter: Mapping[str, Tensor], scale: float, component: str = "unet") -> State:
    """The adapter's weights as `pipe.load_lora_weights` takes them.

    The file carries no alpha, which loaders read as alpha = rank; so the scale goes into B, in
    float32 before it is rounded back to the adapter's own type.

    Args:
        adapter: PEFT's state: `….lora_A.weight` (rank, in, …) and `….lora_B.weight` (out, rank, …),
            with or without PEFT's prefix and the adapter's name.
        scale: By which the adapter multiplies B A: alpha / rank, or alpha / √rank for rsLoRA.
        component: The pipeline's part it belongs to: unet or transformer.

    Raises:
        UserError: it holds weights that are not LoRA's (DoRA's magnitudes, LoHa, LoKr).
    """
    made = {}
    for key, value in adapter.items():
        module, kind = parts(key)
        if kind == "B":
            value = (value.float() * scale).to(value.dtype)
        made[f"{component}.{module}.lora_{kind}.weight"] = value.contiguous()
    return paired(made)


def parts(key: str) -> tuple[str, str]:
    """The module and "A" or "B" of one PEFT key."""
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight", key)
    if match is None:
        raise UserError(f"LoRA: {key!r} is not a LoRA weight; only plain LoRA can be exported so")
    return match[1], match[2]


def paired(state: State) -> State:
    """The state, if every A has its B."""
    for key in state:
        other = key.replace(".lora_A.", ".lora_?.").replace(".lora_B.", ".lora_A.")
        if other.replace(".lora_?.", ".lora_B.") not in state:
            raise UserError(f"LoRA: {key!r} has no counterpart; use diffusers' LoRA")
    return state


def to_kohya(lora: Mapping[str, Tensor], names: Mapping[str, str] | None = None) -> State:
    """A UNet's diffusers LoRA with kohya's keys, which ComfyUI and diffusers read.

    Args:
        lora: As `diffusers_lora` makes it, so that alpha is the rank.
        names: LDM's name of each module, as by `ldm_names`, for SDXL; else diffusers' own.

    Raises:
        UserError: it is a transformer's, which `combined.to_original` converts.
    """
    made: State = {}
    for key, value in lora.items():
        module, kind = parts(key)
        if not module.startswith("unet."):
            raise UserError(f"LoRA: {key!r}: only a UNet has kohya's keys; use diffusers' LoRA")
        name = kohya_name(module.removeprefix("unet."), names)
        made[f"{name}.lora_{'down' if kind == 'A' else 'up'}.weight"] = value
        if kind == "A":
            made[f"{name}.alpha"] = torch.tensor(float(len(value)))
    return made


def from_kohya(
    state: Mapping[str, Tensor], modules: Iterable[str], names: Mapping[str, str] | None = None
) -> State:
    """The diffusers LoRA of a UNet's kohya file, alpha / rank folded into B.

    Args:
        modules: Names of the UNet's modules, since kohya's keys do not tell dots from underscores.
        names: As for `to_kohya`.

    Raises:
        UserError: a key belongs to none of the modules, or a weight has no counterpart.
    """
    known = {kohya_name(m, names): m for m in modules if names is None or m in names}
    made: State = {}
    for key, value in state.items():
        name, _, rest = key.partition(".")
        if name not in known:
            raise UserError(f"LoRA: {key!r} belongs to no module of this UNet; give its own UNet")
        if rest == "lora_down.weight":
            made[f"unet.{known[name]}.lora_A.weight"] = value
        elif rest == "lora_up.weight":
            rank = value.shape[1]
            alpha = float(state[f"{name}.alpha"]) if f"{name}.alpha" in state else rank
            folded = (value.float() * (alpha / rank)).to(value.dtype)
            made[f"unet.{known[name]}.lora_B.weight"] = folded
        elif rest != "alpha":
            raise UserError(f"LoRA: {key!r} is not a LoRA weight; only plain LoRA can be read")
    return paired(made)


def kohya_name(module: str, names: Mapping[str, str] | None) -> str:
    return "lora_unet_" + (module if names is None else names[module]).replace(".", "_")


# ---- LDM's names, which single files use


def unet_to_ldm(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> State:
    """A UNet2DConditionModel's weights by LDM's names."""
    names = ldm_names(state, config)
    return {names[key]: value for key, value in state.items()}


ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_to_ldm(state: Mapping[str, Tensor]) -> State:
    """An AutoencoderKL's weights by LDM's names; its attention's matrices become 1×1 kernels."""
    levels = 1 + max(
        (int(m[1]) for k in state if (m := re.search(r"up_blocks\.(\d+)", k))), default=0
    )
    made = {}
    for key, value in state.items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(
            r"up_blocks\.(\d+)\.(resnets|upsamplers\.0)",
            lambda m: f"up.{levels - 1 - int(m[1])}.{'block' if m[2] == 'resnets' else 'upsample'}",
            name,
        )
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if (place := "mid_block.attentions.0.") in name:
            head, part = name.split(place)
            part, _, last = part.rpartition(".")
            name = f"{head}mid.attn_1.{ATTENTION[part]}.{last}"
            value = value[..., None, None] if value.ndim == 2 else value
        made[name] = value
    return made


def clip_to_ldm(state: Mapping[str, Tensor]) -> State:
    """A CLIPTextModel's weights as SD 1.x and SDXL's first encoder have them: transformers' own."""
    return {f"transformer.text_model.{bare(key)}": value for key, value in state.items()}


OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip_to_ldm(state: Mapping[str, Tensor]) -> State:
    """A CLIPTextModelWithProjection's weights by OpenCLIP's names, as SDXL's second encoder's.

    OpenCLIP keeps query, key and value in one matrix, and the projection transposed.
    """
    made: State = {}
    for key, value in state.items():
        name = bare(key)
        if name == "text_projection.weight":
            made["text_projection"] = value.T
        elif name in OPEN_CLIP:
            made[OPEN_CLIP[name]] = value
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            layer, part, last = f"transformer.resblocks.{match[1]}", match[2], match[3]
            if part in LAYER:
                made[f"{layer}.{LAYER[part]}.{last}"] = value
            elif part == "self_attn.q_proj":
                rows = [state[key.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
                made[f"{layer}.attn.in_proj_{last}"] = torch.cat(rows)
    return made


def bare(key: str) -> str:
    """A text encoder's key without the wrapper that only some transformers versions write."""
    return key.removeprefix("text_model.")


def single_file(pipe: Any) -> State:
    """All weights of a Stable Diffusion 1.x or SDXL pipeline as one LDM checkpoint.

    The scheduler is not in it: diffusers reads that from the folder given as `config=`, and other
    programs from their own settings.

    Raises:
        UserError: the pipeline is of another kind.
    """
    kind, states = type(pipe).__name__, {}
    prefixes = {"unet": "model.diffusion_model", "vae": "first_stage_model"}
    if kind == "StableDiffusionPipeline" and pipe.text_encoder.config.hidden_act == "quick_gelu":
        prefixes["text_encoder"] = "cond_stage_model"
    elif kind == "StableDiffusionXLPipeline":
        prefixes |= {
            "text_encoder": "conditioner.embedders.0",
            "text_encoder_2": "conditioner.embedders.1.model",
        }
    else:
        raise UserError(
            f"single file: {kind} has none here (Stable Diffusion 1.x and SDXL do); "
            "use the diffusers folder"
        )
    convert = {
        "unet": lambda state: unet_to_ldm(state, pipe.unet.config),
        "vae": vae_to_ldm,
        "text_encoder": clip_to_ldm,
        "text_encoder_2": open_clip_to_ldm,
    }
    for part, prefix in prefixes.items():
        converted = convert[part](getattr(pipe, part).state_dict())
        states |= {f"{prefix}.{k}": v.contiguous() for k, v in converted.items()}
    return states


# ---- written, once stock diffusers has drawn the student's pictures from them

# Runs in another process, with none of our packages imported.
SCRIPT = (
    PICTURES
    + """
import json, sys, diffusers, torch
from safetensors.torch import save_file
folder, out, kind, asked = sys.argv[1:5]
files, counts, absent, *more = map(json.loads, sys.argv[5:])
pictures = pictures_in(*more)
kind, images = getattr(diffusers, kind), {}
for i, (whole, file) in enumerate(files):
    if whole:
        pipe = kind.from_single_file(file, config=folder, local_files_only=True)
    else:
        pipe = kind.from_pretrained(folder, **dict.fromkeys(absent))
        place, _, name = file.rpartition("/")
        pipe.load_lora_weights(place, weight_name=name)  # diffusers 0.36 guesses no name offline
    pipe.set_progress_bar_config(disable=True)
    for steps in counts:
        draw = torch.Generator().manual_seed(0)
        torch.manual_seed(1)
        # afresh: some pipelines write to their lists
        arguments = json.loads(asked) | pictures
        made = pipe(num_inference_steps=steps, generator=draw, output_type="pt", **arguments)
        images[f"{i} {steps}"] = next(iter(made.values())).contiguous()
save_file(images, out)
"""
)


@dataclass(frozen=True)
class File:
    """A file to be written: LoRA weights in any of the forms above, or all of a pipeline's.

    Args:
        metadata: The header's, as `students/metadata/turbo.py` makes it; empty for none.
        beside: Text files that appear beside it, by name.
        gap: Compares it with the student and returns the largest difference, as `weight_gap` does,
            where stock diffusers is not asked to draw with it.
    """

    path: Path
    state: State
    whole: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, str] = field(default_factory=dict)
    gap: Callable[[Path], float] | None = None


# What pictures are compared on, unless the family asks for other arguments.
ONE = {"prompt": ["a red circle"], "guidance_scale": 1.0}


def write(
    files: Sequence[File],
    student: Any,
    folder: Path,
    counts: Sequence[int],
    arguments: Mapping[str, Any] = ONE,
) -> None:
    """Write the files, once stock diffusers, in another process, has been seen to agree with them.

    A LoRA is loaded at strength 1.0 onto `folder`, a whole file by `from_single_file`; either must
    give the student's pictures. The files appear under their names only when all of them do, and
    when the σ in their headers are those that the stock pipeline used.

    Args:
        student: The pipeline with the adapter merged, which pictures are compared with.
        folder: The diffusers folder of the base, with the student's scheduler.
        counts: The step counts to compare at.
        arguments: Of the pipelines, for unguided pictures: as JSON has them, and pictures.

    Raises:
        ExportError: stock diffusers cannot load a file, its pictures differ, or its header is
            wrong.
    """
    drafts = [f.path.with_name(f".draft-{f.path.name}") for f in files]
    try:
        for file, draft in zip(files, drafts, strict=True):
            tensors = {k: v.contiguous() for k, v in file.state.items()}
            save_tensors(tensors, draft, file.metadata or None)
        drawn = [i for i, file in enumerate(files) if file.gap is None]
        jobs = [(files[i].whole, str(drafts[i].resolve())) for i in drawn]
        theirs: State = {}
        if jobs:
            theirs = drawn_elsewhere(jobs, type(student).__name__, folder, counts, arguments)
        student.set_progress_bar_config(disable=True)
        pictured = any(isinstance(v, Tensor) for v in arguments.values())
        described, used = any(f.metadata for f in files), {}
        gaps = [0.0 if f.gap is None else f.gap(d) for f, d in zip(files, drafts, strict=True)]
        for steps in counts:
            rng = torch.Generator().manual_seed(0)
            with torch.random.fork_rng(), posterior_modes(pictured):
                torch.manual_seed(1)  # for pipelines that do not hand their generator on
                asked = deepcopy(dict(arguments))  # some write to their lists
                made = student(num_inference_steps=steps, generator=rng, output_type="pt", **asked)
            used[steps] = times_used(student.scheduler) if described else None
            ours = next(iter(made.values())).cpu()
            for place, i in enumerate(drawn):
                gap = compare(ours, theirs[f"{place} {steps}"], steps, files[i].path.name)
                gaps[i] = max(gaps[i], gap)
        for file, draft, gap in zip(files, drafts, gaps, strict=True):
            publish(file, draft, used, gap)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def publish(file: File, draft: Path, used: Mapping[int, Any], gap: float) -> None:
    """Check and finish a draft's header, and give the draft and the files beside it their names.

    Raises:
        ExportError: the header says other σ than the stock pipeline used.
    """
    if file.metadata:
        try:
            check_header(draft, used)
        except ValueError as error:
            raise ExportError(f"{file.path.name}: {error}") from None
        finish_header(draft, gap)
    draft.replace(file.path)
    for name, text in file.beside.items():
        file.path.with_name(name).write_text(text, encoding="utf-8")


def compare(ours: Tensor, theirs: Tensor, steps: int, name: str) -> float:
    """The largest difference of a pixel; raise unless it is rounding."""
    gap = (ours - theirs).abs().max().item()
    if not gap <= TOLERANCE:
        raise ExportError(
            f"at {steps} steps {name} differs from the student by {gap:.2g} of the pixel range "
            f"(at most {TOLERANCE:g} is rounding)"
        )
    return gap


def drawn_elsewhere(
    jobs: list[tuple[bool, str]],
    kind: str,
    folder: Path,
    counts: Sequence[int],
    arguments: Mapping[str, Any],
) -> State:
    """The pictures of each file at each step count, by a process that has only stock packages."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "images.safetensors"
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        absent = [k for k, v in index.items() if isinstance(v, list) and v[0] is None]
        asked, file = apart(arguments, Path(scratch) / "pictures.safetensors")
        plain = [json.dumps(v) for v in (asked, jobs, list(counts), absent, file)]
        words = [str(folder.resolve()), str(out), kind, *plain]
        result = subprocess.run(
            [sys.executable, "-I", "-c", SCRIPT, *words],
            cwd=scratch,
            capture_output=True,
            text=True,
            env={**child_environment(), "HF_HUB_OFFLINE": "1"},
        )
        if result.returncode:
            names = ", ".join(Path(file).name.removeprefix(".draft-") for _, file in jobs)
            raise ExportError.of(names, result.stderr)
        return load_file(out)
