"""ComfyUI graphs of few-step students, in the API form, for every family that ComfyUI's core has.

The names of nodes and inputs are from ComfyUI's source. A graph holds the student's exact σ in a
`ManualSigmas` node, so none of ComfyUI's schedulers and no `ModelSampling…` shift takes part.

| family | loaders | latent | more |
|---|---|---|---|
| SD 1.x, 2.x, SDXL | checkpoint | EmptyLatentImage | ModelSamplingDiscrete, for v and x |
| SD 3 | checkpoint, two or three CLIPs | EmptySD3LatentImage | |
| FLUX.1 | UNET, two CLIPs, VAE | EmptySD3LatentImage | FluxGuidance, if the network reads it |
| Qwen-Image, Z-Image, Krea 2, LongCat-Image | UNET, CLIP, VAE | EmptySD3LatentImage | |
| Lumina 2 | UNET, CLIP, VAE | EmptySD3LatentImage | CLIPTextEncodeLumina2 |
| Chroma | UNET, CLIP, VAE | EmptySD3LatentImage | T5TokenizerOptions: one token of padding |
| FLUX.2, ERNIE-Image | UNET, CLIP, VAE | EmptyFlux2LatentImage | FluxGuidance, as FLUX.1 |
| HiDream | UNET, four CLIPs, VAE | EmptySD3LatentImage | |
| AuraFlow, HunyuanDiT | checkpoint | EmptyLatentImage | |
| PixArt | UNET, CLIP, VAE | EmptyLatentImage | |
| Wan | UNET, CLIP, VAE | EmptyHunyuanLatentVideo | SaveAnimatedWEBP |

Students of SANA and Kolors have no graph, because ComfyUI's core has neither.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from students.metadata.comfyui_nodes import KINDS, NODES
from teachers.process import Tabulated

Graph = dict[str, dict[str, Any]]
Link = list[Any]  # a node's name and the index of one of its outputs

PROMPT = "a lighthouse at dusk"
ZSNR_SIGMA = 4518.7694  # the highest σ of ComfyUI's table where the terminal SNR is zero
PREDICTIONS = {"eps": "eps", "v": "v_prediction", "x": "x0"}  # of ModelSamplingDiscrete
NUMBER = re.compile(r"[-+]?(?:\d*\.*\d+)")  # how ManualSigmas reads its text: without exponents


@dataclass(frozen=True)
class Family:
    """What a family's graph loads.

    Args:
        clips: Files of the text encoders; empty: they are in the checkpoint.
        kind: The type that the CLIP loader is given.
        vae: The VAE's file; empty: it is in the checkpoint, as the network is.
        latent: The node of the empty latent.
        predicts: What ComfyUI takes a network of ε or v for, unless ModelSamplingDiscrete says so.
        tables: Of networks of ε or v, ComfyUI's tables of σ; it takes one by the base's weights.
    """

    clips: tuple[str, ...] = ()
    kind: str = ""
    vae: str = ""
    latent: str = "EmptySD3LatentImage"
    tables: tuple[Callable[[], Tabulated], ...] = (Tabulated.scaled_linear,)
    predicts: str = "eps"


MANY = {3: "Triple", 4: "Quadruple"}
SD3_CLIPS = ("clip_g.safetensors", "clip_l.safetensors", "t5xxl_fp16.safetensors")
QWEN_VL = "qwen_2.5_vl_7b_fp8_scaled.safetensors"
T5 = "t5xxl_fp16.safetensors"
FLUX2 = ("flux2", "flux2-vae.safetensors", "EmptyFlux2LatentImage")
PIXART: tuple[Callable[[], Tabulated], ...] = (Tabulated.linear,)
# By the names of the classes in teachers/families and teachers/pipelines.
FAMILIES = {
    "StableDiffusion": Family(latent="EmptyLatentImage"),
    "SDXL": Family(latent="EmptyLatentImage"),
    "StableDiffusion3": Family(SD3_CLIPS, "sd3"),
    "Flux": Family(("clip_l.safetensors", T5), "flux", "ae.safetensors"),
    "Flux2": Family(("mistral_3_small_flux2_bf16.safetensors",), *FLUX2),
    "Flux2Klein": Family(("qwen_3_4b.safetensors",), *FLUX2),
    "Chroma": Family((T5,), "chroma", "ae.safetensors"),
    "LongCat": Family((QWEN_VL,), "longcat_image", "ae.safetensors"),
    "Lumina2": Family(("gemma_2_2b_fp16.safetensors",), "lumina2", "ae.safetensors"),
    "AuraFlow": Family(latent="EmptyLatentImage"),
    "Ernie": Family(("ministral-3-3b.safetensors",), *FLUX2),
    "HiDream": Family(
        ("clip_l_hidream.safetensors", "clip_g_hidream.safetensors", T5,
         "llama_3.1_8b_instruct_fp8_scaled.safetensors"), "hidream", "ae.safetensors",
    ),
    "HunyuanDiT": Family(
        latent="EmptyLatentImage",
        tables=tuple(partial(Tabulated.scaled_linear, end=end) for end in (0.018, 0.03)),
        predicts="v",
    ),
    "Krea2": Family(("qwen3vl_4b_fp8_scaled.safetensors",), "krea2", "qwen_image_vae.safetensors"),
    "PixArtAlpha": Family((T5,), "pixart", "sd_vae.safetensors", "EmptyLatentImage", PIXART),
    "PixArtSigma": Family((T5,), "pixart", "sdxl_vae.safetensors", "EmptyLatentImage", PIXART),
    "QwenImage": Family((QWEN_VL,), "qwen_image", "qwen_image_vae.safetensors"),
    "ZImage": Family(("qwen_3_4b.safetensors",), "lumina2", "ae.safetensors"),
    "Wan": Family(
        ("umt5_xxl_fp8_e4m3fn_scaled.safetensors",), "wan", "wan_2.1_vae.safetensors",
        "EmptyHunyuanLatentVideo",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What a graph is made of.

    Args:
        family: A name in `FAMILIES`.
        base: The file of the base model; of a single file, that file.
        lora: The LoRA's file; None for a single file.
        sigmas: σ of each step as ComfyUI counts them, from noise, with the final 0.
        renoise: Renoise between the steps (`lcm`), or follow the ODE (`euler`).
        size: Height and width in pixels; (frames, height, width) for videos.
        predicts: "eps", "v", "x" or "flow".
        zero_snr: The base's last index is pure noise.
        guidance: The scale that a guidance-distilled network reads; None: it reads none.
        t5: Whether an SD 3 pipeline has its third encoder.
        encoders: Whether the LoRA has layers of text encoders, which get it as well.
    """

    family: str
    base: str
    lora: str | None
    sigmas: Sequence[float]
    renoise: bool
    size: tuple[int, ...]
    predicts: str
    zero_snr: bool = False
    guidance: float | None = None
    t5: bool = True
    encoders: bool = False


class Builder:
    """A graph under construction: nodes get the names "1", "2", … in the order of their making."""

    def __init__(self) -> None:
        self.nodes: Graph = {}

    def add(self, kind: str, output: int = 0, **inputs: Any) -> Link:
        """Add a node; the link to one of its outputs."""
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": kind, "inputs": inputs}
        return [name, output]


def graph(request: Request) -> Graph:
    """The graph of a student at one step count, which saves one picture or video."""
    build, family = Builder(), FAMILIES[request.family]
    model, clip, vae = loaders(build, family, request)
    if request.lora is not None and request.encoders:
        both = build.add(
            "LoraLoader", model=model, clip=clip, lora_name=request.lora, strength_model=1.0,
            strength_clip=1.0,
        )  # fmt: skip
        model, clip = both, [both[0], 1]
    elif request.lora is not None:
        model = build.add(
            "LoraLoaderModelOnly", model=model, lora_name=request.lora, strength_model=1.0
        )
    usual = request.predicts == family.predicts and not request.zero_snr
    if request.predicts in PREDICTIONS and not usual:
        model = build.add(
            "ModelSamplingDiscrete",
            model=model,
            sampling=PREDICTIONS[request.predicts],
            zsnr=request.zero_snr,
        )
    text = encoded(build, request.family, clip)
    if request.guidance is not None:
        text = build.add("FluxGuidance", conditioning=text, guidance=float(request.guidance))
    *frames, height, width = request.size
    length = {"length": frames[0]} if frames else {}
    samples = build.add(
        "SamplerCustomAdvanced",
        noise=build.add("RandomNoise", noise_seed=0),
        guider=build.add("BasicGuider", model=model, conditioning=text),
        sampler=build.add("KSamplerSelect", sampler_name="lcm" if request.renoise else "euler"),
        sigmas=build.add("ManualSigmas", sigmas=sigma_text(request.sigmas)),
        latent_image=build.add(family.latent, width=width, height=height, **length, batch_size=1),
    )
    images = build.add("VAEDecode", samples=samples, vae=vae)
    if frames:
        build.add(
            "SaveAnimatedWEBP", images=images, filename_prefix="turbo", fps=16.0, lossless=False,
            quality=90, method="default",
        )  # fmt: skip
    else:
        build.add("SaveImage", images=images, filename_prefix="turbo")
    return build.nodes


def encoded(build: Builder, family: str, clip: Link) -> Link:
    """A link to the encoded prompt, as diffusers' pipeline of the family encodes it."""
    if family == "Lumina2":
        return build.add(
            "CLIPTextEncodeLumina2", system_prompt="superior", user_prompt=PROMPT, clip=clip
        )
    if family == "Chroma":
        clip = build.add("T5TokenizerOptions", clip=clip, min_padding=1, min_length=0)
    return build.add("CLIPTextEncode", text=PROMPT, clip=clip)


def loaders(build: Builder, family: Family, request: Request) -> tuple[Link, Link, Link]:
    """Links to the base's network, its text encoders and its VAE."""
    if family.vae:
        model = build.add("UNETLoader", unet_name=request.base, weight_dtype="default")
        vae = build.add("VAELoader", vae_name=family.vae)
    else:
        model = build.add("CheckpointLoaderSimple", ckpt_name=request.base)
        vae = [model[0], 2]
    clips = family.clips
    if request.family == "StableDiffusion3" and not request.t5:
        clips = clips[:2]
    if not clips:
        return model, [model[0], 1], vae
    names: dict[str, Any] = {f"clip_name{i}": name for i, name in enumerate(clips, 1)}
    if len(clips) == 1:
        return model, build.add("CLIPLoader", clip_name=clips[0], type=family.kind), vae
    if len(clips) == 2:
        return model, build.add("DualCLIPLoader", **names, type=family.kind), vae
    return model, build.add(f"{MANY[len(clips)]}CLIPLoader", **names), vae


def sigma_text(sigmas: Sequence[float]) -> str:
    """σ as `ManualSigmas` reads them: plain decimals, because it knows no exponents."""
    return ", ".join(f"{s:.7f}" for s in sigmas)


def comfyui_sigmas(sigmas: Sequence[float]) -> tuple[float, ...]:
    """A student's σ as ComfyUI counts them: at zero terminal SNR, where σ is infinite, ComfyUI's
    table ends at a finite value."""
    return tuple(min(s, ZSNR_SIGMA) for s in sigmas)


def reads_indices(
    sigmas: Sequence[float],
    timesteps: Sequence[int],
    zero_snr: bool,
    process: Callable[[], Tabulated] = Tabulated.scaled_linear,
) -> bool:
    """Whether ComfyUI, which finds the index that is nearest in log σ, calls the network of ε or v
    at these timesteps.

    Args:
        process: With the family's betas. A base with others has no graph.
    """
    table = process().log_ratio
    if zero_snr:
        bar = torch.sigmoid(-2 * table).sqrt()
        bar = (bar - bar[-1]) * bar[0] / (bar[0] - bar[-1])
        table = (1 / bar.square().clamp(min=1 / (ZSNR_SIGMA**2 + 1)) - 1).log() / 2
    wanted = torch.tensor([s for s in comfyui_sigmas(sigmas) if s > 0], dtype=torch.float64).log()
    nearest = (wanted[:, None] - table).abs().argmin(1)
    return nearest.tolist() == list(timesteps)


def faults(nodes: Graph) -> list[str]:
    """What ComfyUI would refuse in a graph: unknown nodes, wrong inputs, links to nothing."""
    found = []
    for name, node in nodes.items():
        kind = str(node.get("class_type"))
        if kind not in NODES:
            found.append(f"node {name}: {kind} is unknown")
            continue
        wanted, inputs = NODES[kind][0], node.get("inputs", {})
        if inputs.keys() != wanted.keys():
            odd = sorted(inputs.keys() ^ wanted.keys())
            found.append(f"node {name}: {kind}: inputs {', '.join(odd)} are missing or too many")
        for key in inputs.keys() & wanted.keys():
            if fault := link_fault(nodes, wanted[key], inputs[key]):
                found.append(f"node {name}: {kind}.{key}: {fault}")
    return found


def link_fault(nodes: Graph, kind: str, value: Any) -> str:
    """What is wrong with the value of an input of this kind; empty if nothing is."""
    if kind in KINDS:
        return "" if type(value) is KINDS[kind] else f"{value!r} is no {kind}"
    if not isinstance(value, list) or len(value) != 2 or value[0] not in nodes:
        return f"{value!r} is no link to a node of this graph"
    outputs = NODES.get(str(nodes[value[0]].get("class_type")), ({}, ()))[1]
    if type(value[1]) is not int or not 0 <= value[1] < len(outputs) or outputs[value[1]] != kind:
        return f"output {value[1]} of node {value[0]} is no {kind}"
    return ""


def graph_sigmas(nodes: Graph) -> list[float]:
    """σ of a graph's `ManualSigmas` node, read as ComfyUI reads them; empty without such a node."""
    texts = [n["inputs"]["sigmas"] for n in nodes.values() if n["class_type"] == "ManualSigmas"]
    return [float(v) for text in texts for v in NUMBER.findall(text)]


def as_text(nodes: Graph) -> str:
    return json.dumps(nodes, ensure_ascii=False)
