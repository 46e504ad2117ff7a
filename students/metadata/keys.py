"""The keys of a student's header, from its facts.

| keys | read by |
|---|---|
| `turbo.*` | `distill show`; documented in docs/sharing.md |
| `modelspec.*` (1.0.1) | SwarmUI and sd-scripts |
| `ss_*` | A1111 and Forge, for display |
| `lora_adapter_metadata` | diffusers: the fields of a LoraConfig |
| `prompt` | ComfyUI's front end opens the graph of a file that is dropped on it |

All values are strings; what is not text is JSON. No key is `alpha`, which some loaders read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from students.metadata import comfyui
from students.metadata.turbo import Turbo

VERSION = 1
NO_HASH = "0x" + 64 * "0"  # stands in for the hash of a file that is not written yet
HASH = "modelspec.hash_sha256"
VERIFIED = "turbo.verified"
UNVERIFIED = 0.123456789012345  # stands in for a measured difference, and is longer than any


def header(turbo: Turbo, name: str, graph: comfyui.Graph | None, lora: bool) -> dict[str, str]:
    """A file's metadata, without what depends on its tensors (`lora_fields`).

    Args:
        name: The file's name.
        graph: Its ComfyUI graph; None if there is none.
        lora: Whether it is a LoRA, and not a single file of all weights.
    """
    import diffusers

    most, base = max(turbo.steps), str(turbo.base["repo"])
    size = turbo.size[-2:]
    kind, implementation, version, _ = turbo.architecture
    plain: dict[str, Any] = {
        "turbo.version": VERSION,
        "turbo.steps": turbo.steps,
        "turbo.sampler": "renoise" if turbo.renoise else "ode",
        "turbo.sigmas": {str(k): list(turbo.sigmas[k]) for k in turbo.steps},
        "turbo.timesteps": {str(k): list(v) for k, v in sorted(turbo.timesteps.items())} or None,
        "turbo.shift": turbo.shift,
        "turbo.cfg": 1.0,
        "turbo.strength": 1.0 if lora else None,
        "turbo.embedded_guidance": turbo.embedded_guidance,
        "turbo.base": turbo.base,
        "turbo.contains": list(turbo.contains),
        "turbo.recipe": turbo.recipe,
        "turbo.objective": turbo.objective or None,
        "turbo.scheduler": turbo.scheduler,
        VERIFIED: {"diffusers": [diffusers.__version__], "max_abs": UNVERIFIED},
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{kind}/lora" if lora else kind,
        "modelspec.implementation": implementation,
        "modelspec.title": f"{base}, {most}-step student",
        "modelspec.resolution": f"{size[1]}x{size[0]}",
        "modelspec.date": datetime.now(UTC).date().isoformat(),
        "modelspec.license": turbo.licence or None,
        "modelspec.prediction_type": {"eps": "epsilon", "v": "v"}.get(turbo.predicts),
        "modelspec.usage_hint": hint(turbo, lora),
        HASH: NO_HASH,
        "ss_output_name": name.removesuffix(".safetensors"),
        "ss_sd_model_name": base,
        "ss_base_model_version": version,
        "prompt": None if graph is None else comfyui.as_text(graph),
        "format": "pt",
    }
    return {k: as_string(v) for k, v in plain.items() if v is not None}


def as_string(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def hint(turbo: Turbo, lora: bool) -> str:
    """How to sample, in a few words."""
    *rest, last = map(str, sorted(turbo.steps))
    counts = f"{', '.join(rest)} or {last}" if rest else last
    parts = [
        f"{counts} {'step' if turbo.steps == [1] else 'steps'}",
        "cfg 1",
        f"{turbo.sampler} sampler",
    ]
    return ", ".join(parts + ["strength 1"] * lora)


def lora_fields(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata that depends on a LoRA's tensors, of which alpha is the rank.

    A file with diffusers' keys gets `lora_adapter_metadata`. A kohya file does not: it has `.alpha`
    tensors, and diffusers refuses a file with both.
    """
    down = {k: v for k, v in state.items() if k.endswith((".lora_A.weight", ".lora_down.weight"))}
    ranks = {k.rpartition(".lora_")[0]: len(v) for k, v in down.items()}
    one = str(max(ranks.values())) if len({*ranks.values()}) == 1 else "Dynamic"
    fields = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": one,
        "ss_network_alpha": one,
    }
    if all(k.startswith(("unet.", "transformer.")) for k in state):
        fields["lora_adapter_metadata"] = json.dumps(adapter_metadata(ranks))
    return fields


def adapter_metadata(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that a loader needs, each with its component's prefix.

    Args:
        ranks: The rank of each module, whose name begins with the component's.
    """
    part = next(iter(ranks)).partition(".")[0]
    usual = Counter(ranks.values()).most_common(1)[0][0]
    bare = {name.removeprefix(f"{part}."): rank for name, rank in ranks.items()}
    odd = {name: rank for name, rank in bare.items() if rank != usual}
    fields = {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(bare),
    }
    return {f"{part}.{key}": value for key, value in fields.items()}


def forge_notes(turbo: Turbo) -> str:
    """The JSON that A1111 and Forge read beside a LoRA: `NAME.json`."""
    shift = "" if turbo.shift is None else f" Shift {turbo.shift:g}."
    schedule = (
        f"Steps {max(turbo.steps)}, CFG scale 1, sampler {turbo.sampler}.{shift} "
        f"σ: {comfyui.sigma_text(turbo.sigmas[max(turbo.steps)])}. A schedule type of the web UI "
        "may call the network at other σ; ComfyUI and diffusers take these."
    )
    tree = {
        "description": f"Few-step student of {turbo.base['repo']}: {hint(turbo, True)}",
        "sd version": turbo.architecture[3],
        "activation text": "",
        "preferred weight": 1.0,
        "negative text": "",
        "notes": schedule,
    }
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def graph_file(graph: comfyui.Graph) -> str:
    """The JSON beside a file that ComfyUI's front end opens: `NAME.comfyui.json`."""
    return json.dumps(graph, indent=2, ensure_ascii=False) + "\n"
