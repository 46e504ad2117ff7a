"""The facts of a student that its LoRA files and single files carry; `keys.py` has their keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from students import schedulers
from students.generator import Generator
from students.lora import unwrap
from students.metadata import comfyui
from students.metadata.header import data_sha256
from teachers.errors import UserError
from teachers.families.base import Pretrained, Prompted
from teachers.process import Linear, Tabulated
from teachers.storage.variants import WEIGHTS, variant_of
from teachers.teacher import EMBEDDED, Teacher

# By family: modelspec's architecture, its implementation, sd-scripts' and A1111's version.
GENERATIVE = "https://github.com/Stability-AI/generative-models"
BFL = "https://github.com/black-forest-labs"
ARCHITECTURES = {
    "StableDiffusion": ("stable-diffusion-v1", "diffusers", "sd_v1", "SD1"),
    "SDXL": ("stable-diffusion-xl-v1-base", GENERATIVE, "sdxl_base_v1-0", "SDXL"),
    "StableDiffusion3": ("stable-diffusion-3", "diffusers", "sd3", "Unknown"),
    "Flux": ("flux-1", f"{BFL}/flux", "flux1", "Unknown"),
    "Flux2": ("flux-2-dev", f"{BFL}/flux2", "flux2", "Unknown"),
    "Flux2Klein": ("flux-2-klein", f"{BFL}/flux2", "flux2", "Unknown"),
    "Lumina2": ("lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0", "lumina2", "Unknown"),
    "QwenImage": ("qwen-image", "diffusers", "qwen-image", "Unknown"),
    "ZImage": ("z-image", "diffusers", "z-image", "Unknown"),
    "Sana": ("sana", "diffusers", "sana", "Unknown"),
    "Wan": ("wan-2.1", "diffusers", "wan-2.1", "Unknown"),
    **{kind: (name, "diffusers", name, "Unknown") for kind, name in (
        ("AuraFlow", "auraflow"), ("Chroma", "chroma"), ("Ernie", "ernie-image"),
        ("HiDream", "hidream-i1"), ("HunyuanDiT", "hunyuan-dit"), ("Kolors", "kolors"),
        ("Krea2", "krea-2"), ("LongCat", "longcat-image"), ("PixArtAlpha", "pixart-alpha"),
        ("PixArtSigma", "pixart-sigma"),
    )},
}  # fmt: skip
UNKNOWN = ("unknown", "diffusers", "unknown", "Unknown")


@dataclass(frozen=True)
class Turbo:
    """What a student's files say of it.

    Args:
        sigmas: By step count, σ of each step as the network sees it, with the final 0: t of a flow,
            σ/α of other processes.
        timesteps: By step count, the indices that a DDPM network is called at; empty for flows.
        renoise: As `Generator` has it.
        predicts: "eps", "v", "x" or "flow".
        shift: Of a flow's σ, which contain it already; None for other processes.
        zero_snr: The last index of a DDPM network is pure noise.
        embedded_guidance: The scale that a guidance-distilled network reads; None: it reads none.
        family: The class in teachers/families that the network is of.
        base: The base model: repo, revision, sha256 of its weights, dtype.
        size: Height and width in pixels; (frames, height, width) for videos.
        scheduler: The stock scheduler's config.
        recipe: SHA-256 of the recipe.
        contains: LoRA files of others that are part of the weights: file, sha256, strength of each.
    """

    sigmas: dict[int, tuple[float, ...]]
    timesteps: dict[int, tuple[int, ...]]
    renoise: bool
    predicts: str
    shift: float | None
    zero_snr: bool
    embedded_guidance: float | None
    family: str
    architecture: tuple[str, str, str, str]
    base: dict[str, str | None]
    size: tuple[int, ...]
    scheduler: dict[str, Any]
    recipe: str
    objective: str = ""
    licence: str = ""
    t5: bool = True
    contains: tuple[Mapping[str, Any], ...] = ()

    @property
    def steps(self) -> list[int]:
        """The step counts, the largest first."""
        return sorted(self.sigmas, reverse=True)

    @property
    def sampler(self) -> str:
        """What ComfyUI, A1111 and Forge call the sampler."""
        return "LCM" if self.renoise else "Euler"

    def graph(self, file: str, lora: bool, encoders: bool = False) -> comfyui.Graph | None:
        """The ComfyUI graph at the largest step count; None if ComfyUI has no such model.

        Args:
            file: The name of the LoRA's file, or of the single file.
            encoders: Whether the LoRA has layers of text encoders.
        """
        steps = max(self.steps)
        if self.family not in comfyui.FAMILIES:
            return None
        sigmas = self.sigmas[steps]
        tables = comfyui.FAMILIES[self.family].tables
        if self.timesteps and not any(
            comfyui.reads_indices(sigmas, self.timesteps[steps], self.zero_snr, table)
            for table in tables
        ):
            return None
        name = str(self.base["repo"]).rpartition("/")[2].removesuffix(".safetensors")
        base = f"{name}.safetensors"
        return comfyui.graph(
            comfyui.Request(
                family=self.family,
                base=base if lora else file,
                lora=file if lora else None,
                sigmas=comfyui.comfyui_sigmas(sigmas),
                renoise=self.renoise,
                size=self.size,
                predicts=self.predicts,
                zero_snr=self.zero_snr,
                guidance=self.embedded_guidance,
                t5=self.t5,
                encoders=encoders,
            )
        )


def describe(
    generator: Generator,
    teacher: Teacher,
    recipe: Mapping[str, Any],
    licence: str = "",
    folder: Path | None = None,
) -> Turbo:
    """The facts of a student of a stock pipeline.

    Args:
        recipe: The resolved recipe, whose hash is kept.
        licence: The name of the licence that the student inherits.
        folder: The base's diffusers folder or single file, whose network is hashed; None leaves
            the hash out.

    Raises:
        UserError: its process is neither a flow nor DDPM's, so that LoRA files do not fit it.
    """
    network, codec = unwrap(generator.denoiser), teacher.codec
    assert isinstance(codec, Prompted)
    process = network.process
    sigmas, timesteps = {}, {}
    if not isinstance(process, Linear | Tabulated):
        raise UserError(
            f"{teacher.source}: no header describes a {type(process).__name__} process; "
            "use student/"
        )
    for steps, times in generator.grids.items():
        scales = [[float(v) for v in process.scales(time)] for time in as_float64(times)]
        flow = isinstance(process, Linear)
        levels = [sigma if flow else sigma / alpha for alpha, sigma in scales]
        sigmas[steps] = (*(round(s, 8) for s in levels), 0.0)
        if isinstance(process, Tabulated):
            timesteps[steps] = tuple(round(t * process.last) for t in times)
    stock = schedulers.scheduler(generator)
    return Turbo(
        sigmas=sigmas,
        timesteps=timesteps,
        renoise=bool(generator.renoise),
        predicts=predicts_of(stock.config, process),
        shift=process.shift if isinstance(process, Linear) else None,
        zero_snr=bool(stock.config.get("rescale_betas_zero_snr", False)),
        embedded_guidance=getattr(codec, "guidance", None),
        family=family_of(codec),
        architecture=architecture(network, codec),
        base=base_of(network, teacher.source, folder),
        size=tuple(int(n) for n in codec.size),
        scheduler=json.loads(stock.to_json_string()),
        recipe=hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest(),
        objective=str((recipe.get("objective") or {}).get("name", "")).rpartition("/")[2],
        licence=licence,
        t5=getattr(codec.pipe, "text_encoder_3", None) is not None,
        contains=() if teacher.fusion is None else tuple(teacher.fusion.contents()),
    )


def family_of(codec: Prompted) -> str:
    """The family's class; FLUX.2's two pipelines have text encoders of two kinds."""
    klein = type(codec.pipe).__name__ == "Flux2KleinPipeline"
    return "Flux2Klein" if klein else codec.kind.__name__


def as_float64(times: tuple[float, ...]) -> Tensor:
    import torch

    return torch.tensor(times, dtype=torch.float64)


def predicts_of(config: Mapping[str, Any], process: Any) -> str:
    """What the network predicts: "flow", "eps", "v" or "x"."""
    if isinstance(process, Linear):
        return "flow"
    kinds = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
    return kinds[str(config.get("prediction_type", "epsilon"))]


def architecture(network: Pretrained, codec: Prompted) -> tuple[str, str, str, str]:
    """Modelspec's architecture and implementation; sd-scripts' version; A1111's version."""
    # a network that reads a picture as well is of its text-to-image family
    kinds = codec.kind.__mro__ if codec.pictures else ()
    names = [family_of(codec), *(kind.__name__ for kind in kinds)]
    family = next((name for name in names if name in ARCHITECTURES), names[0])
    name, implementation, version, forge = ARCHITECTURES.get(family, UNKNOWN)
    config: Any = network.backbone.config
    if family == "StableDiffusion" and config.cross_attention_dim == 1024:
        v = network.schedule.predicts == "v"
        name = "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"
        version, forge = "sd_v2_v" if v else "sd_v2", "SD2"
    if family == "Flux":
        name += "-dev" if config.guidance_embeds else "-schnell"
    return name, implementation, version, forge


def base_of(network: Pretrained, source: str, folder: Path | None) -> dict[str, str | None]:
    """The base model: its Hub id or its folder's last name, its revision, the hash of its weights.

    No absolute path is in it, because the file is made to be shared.

    Args:
        source: The base, as in a recipe's `teacher.source`.
        folder: Where it lies, or a single file; None leaves its revision and hash unknown.
    """
    revision = digest = None
    if folder is not None:
        resolved = folder.resolve()
        revision = resolved.name if resolved.parent.name == "snapshots" else None
        single = folder.is_file()
        files = single_weights(folder) if single else weight_files(folder / network.PART)
        digest = data_sha256(files) if files else None
    return {
        "repo": public_name(source),
        "revision": revision,
        "sha256": digest,
        "dtype": str(network.dtype).removeprefix("torch."),
    }


def public_name(source: str) -> str:
    """A Hub id as it is; of a folder, its last name."""
    local = source in EMBEDDED or Path(source).expanduser().exists() or source.count("/") != 1
    return Path(source).name if local else source


def single_weights(file: Path) -> list[Path]:
    """A single file, if its data can be hashed as those of safetensors."""
    return [file] if file.suffix == ".safetensors" else []


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a component's weights are read from."""
    names = {p.name: p for p in folder.glob("*.safetensors")}
    variant = variant_of(names)
    matches = [(p, WEIGHTS.fullmatch(n)) for n, p in names.items()]
    return sorted(p for p, match in matches if match and match["variant"] == variant)
