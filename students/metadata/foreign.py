"""Other people's turbo files: known methods by the names of files and what their cards say.

The files of Lightning, Hyper-SD, LCM, DMD2 and others carry no schedule. Their methods are
recognised by the file's name, its folder's, or a title in the header; how a method is sampled is
from its authors' model card. A renamed file cannot be recognised, and nothing here guesses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

STEPS = re.compile(r"(?<![\d.])(\d{1,3})[-_ ]?steps?(?![a-z])", re.IGNORECASE)
# Names that diffusers gives to every file; the folder's name then says which it is.
NAMELESS = ("pytorch_lora_weights", "diffusion_pytorch_model", "model")
TITLES = ("modelspec.title", "modelspec.usage_hint", "modelspec.description", "ss_output_name",
          "ss_training_comment")  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A published method, and how its authors sample it.

    Args:
        pattern: A regex of names, in lower case.
        steps: Its step counts, if the name does not say; "" if they differ by file.
        sampler: The sampler in plain words, and the scheduler of diffusers.
        timesteps: By step count, the indices that the authors give.
        cfg: The guidance scale; 1 is unguided.
        strength: Of a LoRA.
        note: What else a user has to know.
    """

    name: str
    pattern: str
    sampler: str
    cfg: str = "1"
    steps: str = ""
    strength: str = "1"
    note: str = ""
    timesteps: Mapping[int, tuple[int, ...]] | None = None


TRAILING = "Euler with trailing times (ComfyUI: euler, sgm_uniform; diffusers: EulerDiscrete)"
FLOW = "Euler on flow times (ComfyUI: euler, simple; diffusers: FlowMatchEulerDiscrete)"
# The first whose pattern is found counts.
METHODS = (
    Method(
        "Qwen-Image-Lightning", r"qwen.*lightning", FLOW, note="made for shift 3",
    ),
    Method(
        "Wan, step-distilled", r"wan.*(lightx2v|lightning|distill)|lightx2v", FLOW,
    ),
    Method(
        "SDXL-Lightning", r"lightning", TRAILING,
        note="its one-step file predicts x (prediction_type sample), the others ε",
    ),
    Method(
        "Hyper-SD, guided", r"hyper.*(sd3|cfg)", "DDIM with trailing times; for SD 3 flow Euler",
        cfg="5 to 8; for SD 3: 3, 5 or 7 at 4, 8 or 16 steps",
        strength="1; for SD 3 about 0.125",
    ),
    Method(
        "Hyper-SD of FLUX", r"hyper.*flux", FLOW, strength="about 0.125",
        note="the network's own guidance input stays at 3.5",
    ),
    Method(
        "Hyper-SD", r"hyper[-_ ]?(sd|15|xl)",
        "DDIM with trailing times (diffusers: DDIM); its one-step file: TCD",
        note="its one-step LoRA runs in 1 to 8 steps with TCD; its one-step UNet starts at 800",
    ),
    Method(
        "DMD2", r"dmd2?(?![a-z])", "LCM, renoising (ComfyUI: lcm; diffusers: LCMScheduler)",
        timesteps={4: (999, 749, 499, 249), 1: (399,)},
        note="LCMScheduler's own times (999, 759, 499, 259) are not its own; give timesteps",
    ),
    Method(
        "Trajectory consistency (TCD)", r"(?<![a-z])tcd(?![a-z])", "TCD (diffusers: TCDScheduler)",
        steps="4 and more", note="eta 0.3 at four steps, more at more steps",
    ),
    Method(
        "Phased consistency (PCM)", r"(?<![a-z])pcm(?![a-z])",
        "DDIM with trailing times, or Euler; not LCM",
    ),
    Method(
        "Latent consistency (LCM)", r"(?<![a-z])lcm(?![a-z])",
        "LCM, renoising (ComfyUI: lcm; diffusers: LCMScheduler)",
        cfg="1 to 2", steps="2 to 8, usually 4",
        timesteps={4: (999, 759, 499, 259)},
        note="ComfyUI: the node ModelSamplingDiscrete set to lcm, with the scheduler simple",
    ),
    Method(
        "FLUX.1-Turbo-Alpha", r"flux.*turbo|turbo.*alpha", FLOW, steps="8, as its card says",
        note="the network's own guidance input stays at 3.5",
    ),
    Method(
        "SD-Turbo or SDXL-Turbo (ADD)", r"sdxl?[-_ ]?turbo|sd[-_ ]xl[-_ ]turbo",
        "Euler ancestral with trailing times", steps="1 to 4, as its card says",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Recognised:
    """A method, and the words that it was recognised by.

    Args:
        by: Where the words stand, such as "the file's name".
        steps: The step counts that the same words say.
    """

    method: Method | None
    by: str
    steps: tuple[int, ...]


def recognise(path: Path, metadata: Mapping[str, str]) -> Recognised:
    """The method of a file that says nothing of its steps itself."""
    texts = {"the file's name": path.stem}
    texts |= {f"{key} in the header": metadata[key] for key in TITLES if key in metadata}
    if path.stem in NAMELESS:
        texts["the folder's name"] = path.resolve().parent.name
    for by, text in texts.items():
        for method in METHODS:
            if re.search(method.pattern, text.lower()):
                return Recognised(method, by, steps_in(text) or steps_in(path.stem))
    by = next((by for by, text in texts.items() if steps_in(text)), "")
    return Recognised(None, by, steps_in(texts.get(by, "")))


def steps_in(text: str) -> tuple[int, ...]:
    """The step counts that a name says: 4 of "sdxl_lightning_4step_lora"."""
    return tuple(sorted({int(n) for n in STEPS.findall(text.replace("_", " ")) if int(n) > 0}))
