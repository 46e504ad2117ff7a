"""What `distill show FILE` prints: facts of a file, where each is from, and what is unknown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from students.metadata.beside import facts_beside
from students.metadata.foreign import Method, recognise
from students.metadata.header import Header, read_header
from students.metadata.layers import Layers, read_layers
from teachers.errors import UserError, clipped, printable

HEADER, TENSORS, CARD = "the header", "the tensors", "its authors' model card"
LONGEST = 400  # characters of a value that is shown
LARGEST = 1e30  # of a number in a schedule
DEEPEST = 8  # levels of lists and maps in a value
MARK = "turbo.version"
SAMPLING = ("steps", "sampler", "sigmas", "timesteps", "cfg", "strength")
# Keys of the header that other trainers write, by the fact that they state.
STATED = {
    "title": "modelspec.title",
    "base": "ss_sd_model_name",
    "architecture": "modelspec.architecture",
    "resolution": "modelspec.resolution",
    "licence": "modelspec.license",
    "hint": "modelspec.usage_hint",
}


@dataclass
class Report:
    """What is known of a file.

    Attributes:
        ours: Whether the file describes itself in `turbo.*`.
        facts: By name, a value and where it is from.
        unknown: By name, why it cannot be known.
    """

    file: str
    ours: bool
    facts: dict[str, tuple[Any, str]] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: Any, origin: str) -> None:
        """Note a fact, unless it has no value."""
        if value not in (None, "", [], {}):
            self.facts[name] = (value, origin)

    def tree(self) -> dict[str, Any]:
        """As JSON has it."""
        facts = {k: {"value": v, "from": origin} for k, (v, origin) in self.facts.items()}
        return {"file": self.file, "turbo": self.ours, "facts": facts, "unknown": self.unknown}


def report(path: Path) -> Report:
    """What a file says of itself, and what its tensors and its name say.

    Raises:
        UserError: it is no safetensors file, its header is damaged, or its `turbo.*` is.
    """
    if path.is_dir():
        files = sorted(path.glob("lora/*.safetensors"))
        hint = f", such as {files[0]}" if files else ""
        raise UserError(f"{path}: it is a folder; give a .safetensors file{hint}")
    header = read_header(path)
    layers = read_layers(header.tensors)
    found = Report(path.name, MARK in header.metadata)
    found.add("kind", layers.kind, TENSORS)
    found.add("model", layers.model, TENSORS)
    for name, key in STATED.items():
        found.add(name, header.metadata.get(key), HEADER)
    if found.ours:
        add_own(found, path, header)
    elif (student := facts_beside(path))[0]:
        add_student(found, *student)
    else:
        add_foreign(found, path, header, layers)
    found.add("graph", comfyui_graph(header.metadata), HEADER)
    return found


def comfyui_graph(metadata: Mapping[str, str]) -> str:
    """Whether ComfyUI's front end finds a graph in a header, and under which key."""
    keys = [key for key in ("workflow", "prompt") if metadata.get(key)]
    return f"{keys[0]}: drop the file on ComfyUI" if keys else ""


def add_own(found: Report, path: Path, header: Header) -> None:
    """Add what a file of this project says of itself.

    Raises:
        UserError: a value is not as an export writes it.
    """
    values = {
        key.removeprefix("turbo."): own_value(path, key, text)
        for key, text in header.metadata.items()
        if key.startswith("turbo.")
    }
    check_own(path, values)
    base = values["base"]
    sampler = "LCM: renoise between steps" if values["sampler"] == "renoise" else "Euler: the ODE"
    found.add("steps", values["steps"], HEADER)
    found.add("sampler", sampler, HEADER)
    found.add("scheduler", (values.get("scheduler") or {}).get("_class_name"), HEADER)
    for name in ("sigmas", "timesteps", "shift", "cfg", "strength", "embedded_guidance"):
        found.add(name, values.get(name), HEADER)
    found.add("base", base.get("repo"), HEADER)
    found.add("base_revision", base.get("revision"), HEADER)
    found.add("base_sha256", base.get("sha256"), HEADER)
    for name in ("contains", "objective", "recipe", "verified"):
        found.add(name, values.get(name), HEADER)
    if not base.get("sha256"):
        found.unknown["base_sha256"] = "the base was not on the machine that wrote the file"
    if "licence" not in found.facts:
        found.unknown["licence"] = "the file names none"


def add_student(found: Report, facts: Mapping[str, Any], origin: str) -> None:
    """Add what a student's folder says of its network's file."""
    for name, value in facts.items():
        found.add(name, value, origin)
    if "licence" not in found.facts:
        found.unknown["licence"] = "see README.md of the student's folder"


def own_value(path: Path, key: str, text: str) -> Any:
    """The value of a `turbo.*` key.

    Raises:
        UserError: it is not valid JSON where JSON is expected.
    """
    if key in ("turbo.sampler", "turbo.recipe", "turbo.objective"):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise damaged(path, key, "not valid JSON") from None
    if is_deep(value):
        raise damaged(path, key, "nested too deeply")
    return value


def is_deep(value: Any) -> bool:
    """Whether lists and maps are nested in more than `DEEPEST` levels, which no export writes."""
    level = [value]
    for _ in range(DEEPEST):
        parts = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [v for part in parts for v in part]
    return any(isinstance(v, dict | list) for v in level)


def check_own(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse `turbo.*` values that no export writes.

    Raises:
        UserError: a key is missing, or a value is of another form.
    """
    for key in ("steps", "sampler", "sigmas", "base"):
        if key not in values:
            raise damaged(path, f"turbo.{key}", "missing")
    check_schedules(path, values)
    if values["sampler"] not in ("renoise", "ode"):
        raise damaged(path, "turbo.sampler", "neither renoise nor ode")
    if not isinstance(values["base"], dict):
        raise damaged(path, "turbo.base", "not an object")
    if not isinstance(values.get("scheduler") or {}, dict):
        raise damaged(path, "turbo.scheduler", "not an object")


def check_schedules(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse step counts, σ and indices that do not belong together.

    Raises:
        UserError: they do not.
    """
    steps = values["steps"]
    if not isinstance(steps, list) or not steps or not all(type(k) is int and k > 0 for k in steps):
        raise damaged(path, "turbo.steps", "not a list of step counts")
    sigmas, timesteps = values["sigmas"], values.get("timesteps")
    for k in steps:
        if not is_schedule(entry(sigmas, k), k):
            raise damaged(path, "turbo.sigmas", f"at {k} steps not {k} falling σ and a final 0")
        indices = entry(timesteps, k)
        if timesteps is not None and not (isinstance(indices, list) and len(indices) == k):
            raise damaged(path, "turbo.timesteps", f"at {k} steps not {k} indices")


def entry(tree: Any, steps: int) -> Any:
    """What a map by step counts has for one of them; None if it is no map."""
    return tree.get(str(steps)) if isinstance(tree, dict) else None


def is_schedule(levels: Any, steps: int) -> bool:
    """Whether these are the σ of so many steps, falling to a final 0."""
    if not isinstance(levels, list) or len(levels) != steps + 1:
        return False
    # a comparison, because math.isfinite raises an error for integers beyond floats
    if not all(type(s) in (int, float) and abs(s) < LARGEST for s in levels):
        return False
    return levels[-1] == 0 and all(a > b for a, b in zip(levels, levels[1:], strict=False))


def damaged(path: Path, key: str, why: str) -> UserError:
    return UserError(f"{path}: {key}: {why}; export or download the file again")


def add_foreign(found: Report, path: Path, header: Header, layers: Layers) -> None:
    """Add what can be known of a file of other people, and say what cannot."""
    known = recognise(path, header.metadata)
    if known.steps:
        found.add("steps", list(known.steps), known.by)
    if known.method is None:
        add_unrecognised(found, layers)
    else:
        found.add("method", known.method.name, known.by)
        add_method(found, known.method, known.steps, layers)
    missing = {
        "base": "the header names no base model",
        "resolution": "the header does not say",
        "licence": "the header does not say",
    }
    found.unknown |= {name: why for name, why in missing.items() if name not in found.facts}
    if not layers.lora:
        found.unknown.pop("strength", None)


def add_unrecognised(found: Report, layers: Layers) -> None:
    """Add what the tensors say of a file whose method is unknown."""
    missing = "the header does not say, and the file's name has no known method in it"
    found.unknown |= {name: missing for name in SAMPLING if name not in found.facts}
    if layers.like_distillation:
        found.add(
            "method",
            "unknown; it adapts convolutions and time embeddings, as distillation scripts do",
            TENSORS,
        )
    if layers.reads_guidance:
        found.add("guidance_input", "the network reads the guidance scale, as LCM's", TENSORS)


def add_method(found: Report, method: Method, steps: Sequence[int], layers: Layers) -> None:
    """Add what the authors of a method say.

    Args:
        steps: The step counts that the file's name says.
    """
    found.add("sampler", method.sampler, CARD)
    found.add("cfg", method.cfg, CARD)
    found.add("strength", method.strength if layers.lora else "", CARD)
    found.add("note", method.note, CARD)
    if not steps:
        found.add("steps", method.steps, CARD)
    exact = (method.timesteps or {}).get(steps[0]) if len(steps) == 1 else None
    if exact:
        found.add("timesteps", list(exact), CARD)
        found.add("sigmas", sigmas_of(exact), "these timesteps, under Stable Diffusion's betas")
    else:
        found.unknown["sigmas"] = "the header has none; the sampler's own have to be right"
    if "steps" not in found.facts:
        found.unknown["steps"] = "neither the header nor the file's name says"


def sigmas_of(timesteps: Sequence[int]) -> list[float]:
    """σ/α at these indices of Stable Diffusion's table, and the final 0, as ComfyUI takes them."""
    from teachers.process import Tabulated  # imports torch

    table = Tabulated.scaled_linear().log_ratio
    return [*(round(float(table[t].exp()), 6) for t in timesteps), 0.0]


def shown(value: Any) -> str:
    """A fact's value on one line, without control characters of a stranger's file."""
    if isinstance(value, list):
        value = ", ".join(
            shown(v) if isinstance(v, dict) else f"{v:.8g}" if isinstance(v, float) else str(v)
            for v in value
        )
    elif isinstance(value, dict):
        value = "; ".join(f"{k}: {shown(v)}" for k, v in value.items())
    return printable(clipped(value, LONGEST))
