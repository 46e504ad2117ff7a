"""The model card of a student, written from its run.

The front matter follows the Hub's model-card specification, so that the Hub links the student to
its base model, shows its licence, and lists its metrics.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distill.publish.licence import Licence, check_licence, folder_of, hub_id, licence_of
from distill.publish.papers import PAPERS
from distill.publish.results_table import SPREAD, advised, many, not_held_out, rows_of, steps_of
from distill.publish.tuning import HEADS, Tuning, tuning_of
from eval import catalogue
from teachers.errors import UserError, intact
from teachers.storage.files import read_json

GRID = "grid.png"  # the name of the sample grid beside the card
LATE = ("Sana", "QwenImage", "ZImage", "Wan")  # pipelines that draw other pictures before 0.39


@dataclass(frozen=True)
class Card:
    """A card and the files that belong beside it."""

    text: str
    grid: Path | None  # an image of samples, to be saved beside the card as grid.png
    licence: Licence


@dataclass(frozen=True)
class Facts:
    """The data that a card is written from.

    Attributes:
        index: The exported pipeline's model_index.json.
        sidecar: Its fewstep.json: steps, teacher, recipe.
        summary: The run's summary.json; empty before the run is measured.
        where: What the snippet loads: a Hub id, or a folder.
        revision: The branch of the Hub repository that the snippet loads.
        classes: Whether the student is class-conditional.
        adapter: Whether there are LoRA files.
        grid: Whether there is an image of samples.
        override: Why the student may be shared although the teacher's licence forbids it.
        has_code: Whether the folder holds its network's source, which diffusers runs only with
            trust_remote_code.
        stretched: Whether its scheduler stretches the times to a last one (`shift_terminal`), for
            which a schedule needs two steps.
        tuning: What a tuned student kept and gained; None if it was not tuned.
    """

    index: dict[str, Any]
    sidecar: dict[str, Any]
    summary: dict[str, Any] = field(default_factory=dict)
    where: str = "path/to/this/folder"
    revision: str = "main"
    classes: bool = False
    adapter: bool = False
    grid: bool = False
    override: str = ""
    has_code: bool = False
    stretched: bool = False
    tuning: Tuning | None = None

    def setting(self, section: str, key: str, default: Any = None) -> Any:
        """A value of the recipe; the default if the recipe does not have it."""
        part = self.sidecar.get("recipe", {}).get(section) or {}
        return part.get(key, default)

    @property
    def guidance(self) -> float:
        """The teacher's guidance scale g; 1 is unguided."""
        guidance = self.setting("teacher", "guidance", 1.0)
        if not isinstance(guidance, dict):
            return float(guidance)
        scale = guidance["scale"]
        if isinstance(scale, list | tuple):  # a range: the scale that samples are made with
            scale = guidance.get("sampling_scale") or sum(scale) / 2
        return float(scale)

    @property
    def read_scale(self) -> tuple[float, float] | None:
        """The guidance scales that the student's network reads as an input; None if it does not."""
        reading = self.sidecar.get("guidance") or {}
        return tuple(reading["range"]) if reading.get("input") else None

    @property
    def guided(self) -> bool:
        """Whether the student's pipeline guides it, as it guided the teacher."""
        return bool((self.sidecar.get("guidance") or {}).get("guided"))

    @property
    def weaker(self) -> str | None:
        """The weaker model that guided the teacher, under autoguidance; else None."""
        guidance = self.setting("teacher", "guidance")
        return guidance.get("weaker") if isinstance(guidance, dict) else None

    @property
    def counts(self) -> list[int]:
        return self.sidecar["steps"]

    @property
    def teacher(self) -> str:
        return str(self.sidecar["teacher"])

    @property
    def objective(self) -> str:
        return str(self.setting("objective", "name", "a custom objective"))

    @property
    def text(self) -> bool:
        """Whether it is text-conditional."""
        return "tokenizer" in self.index

    @property
    def task(self) -> str:
        if not self.text:
            return "unconditional-image-generation"
        if self.pictures:
            return "image-to-image"
        video = str(self.index.get("_class_name", "")).startswith("Wan")
        return "text-to-video" if video else "text-to-image"

    @property
    def pictures(self) -> dict[str, str]:
        """The arguments that a pipeline with a picture as its condition takes beside the prompt."""
        kind = str(self.index.get("_class_name", ""))
        picture = {"image": 'load_image("photo.png")'}
        if "Inpaint" in kind:  # below strength 1 sampling would not begin at pure noise
            return {**picture, "mask_image": 'load_image("mask.png")', "strength": "1.0"}
        return picture if "Kontext" in kind or "Edit" in kind else {}


def require_finished(run: Path) -> None:
    """Refuse a folder that does not hold a finished run of a diffusers student.

    Raises:
        UserError: it is not a run, or the run is not finished, or its student is of a network of
            the user's own, or its summary is damaged.
    """
    who = f"run {str(run)!r}"
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{who}: no recipe.yaml there; give the folder of a `distill run`")
    if (run / "critic.safetensors").is_file() and not (run / "student").exists():
        raise UserError(
            f"{who}: it trained a discriminator, and has no student; name its critic.safetensors "
            "in the recipe of one, by teacher.discriminator.file"
        )
    if not (run / "summary.json").is_file() or not (run / "student").is_dir():
        raise UserError(f"{who}: not finished; continue it with `distill run … --resume`")
    refuse_own_network(run)
    summary = read_json(run / "summary.json", who)
    if missing := sorted({"steps", "wall_s", "metrics"} - summary.keys()):
        raise UserError(
            f"{who}: summary.json is damaged: it lacks {', '.join(missing)}; "
            "write it again with `distill run … --resume`"
        )


def refuse_own_network(run: Path) -> None:
    """Refuse a run whose student is of a network of the user's own.

    Cards, pages and uploads describe pipelines of diffusers; such a student has a README.md.

    Raises:
        UserError: it is one.
    """
    from students.export.folder import SAMPLER, SIDECAR  # it imports torch

    student = run / "student"
    if (student / SAMPLER).is_file() and not (student / SIDECAR).is_file():
        raise UserError(
            f"run {str(run)!r}: its student is of a network of your own, and cards, reports and "
            f"uploads are for diffusers pipelines; read {student / 'README.md'}, which has its use "
            f"and figures, and {run / 'metrics.jsonl'}, which has its curves"
        )


def card(run: Path, repo: str = "", licence_override: str = "", revision: str = "main") -> Card:
    """The card of a finished run.

    Args:
        repo: The Hub id that the snippet loads; if empty, the run's student folder.
        licence_override: As for `check_licence`; if empty, the recipe's export.licence_override.
        revision: The branch of the Hub repository.

    Raises:
        UserError: the run is not finished or its files are damaged, or the licence of the teacher,
            or of the weaker model that guided it, forbids sharing the student.
    """
    require_finished(run)
    summary = read_json(run / "summary.json", f"run {str(run)!r}")
    facts = facts_of(run / "student", summary, repo or str(run / "student"), revision)
    grid = newest_grid(run, facts.counts)
    override = licence_override or str(facts.setting("export", "licence_override", "") or "")
    licence = check_licence(facts.teacher, override)
    if facts.weaker is not None:
        check_licence(facts.weaker, override)
    adapter = facts.adapter or any((run / "lora").glob("*.safetensors"))
    facts = replace(facts, grid=grid is not None, override=override, adapter=adapter)
    with intact(run / "summary.json"):
        text = write_card(facts, licence)
    return Card(text, grid, licence)


def draft(folder: Path, summary: dict[str, Any] | None = None) -> str:
    """The card in an exported student's folder, without pictures.

    Args:
        summary: The run's, once the student is measured.
    """
    facts = facts_of(folder, summary or {})
    return write_card(facts, licence_of(facts.teacher))


def facts_of(
    folder: Path, summary: dict[str, Any], where: str = Facts.where, revision: str = "main"
) -> Facts:
    """Read the facts about a student from its exported folder.

    Raises:
        UserError: a file of the folder is missing or damaged.
    """
    who = f"student {str(folder)!r}"
    sidecar = read_json(folder / "fewstep.json", who)
    if not is_valid(sidecar):
        raise UserError(f"{who}: fewstep.json is damaged; export the run again")
    config = folder / "unet" / "config.json"
    classes = config.is_file() and bool(read_json(config, who).get("num_class_embeds"))
    lora = (folder / "pytorch_lora_weights.safetensors").is_file()
    index = read_json(folder / "model_index.json", who)
    has_code = any(folder.glob("*/*.py"))
    path = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(path, who) if path.is_file() else {}
    return Facts(
        index,
        sidecar,
        summary,
        where,
        revision,
        classes,
        lora,
        has_code=has_code,
        stretched=bool(scheduler.get("shift_terminal")),
        tuning=tuning_of(folder.parent),
    )


def is_valid(sidecar: dict[str, Any]) -> bool:
    """Whether a fewstep.json holds step counts, a recipe of sections, and the teacher's name."""
    steps, recipe = sidecar.get("steps"), sidecar.get("recipe")
    if not isinstance(steps, list) or not isinstance(recipe, dict):
        return False
    counts = bool(steps) and all(type(k) is int and k > 0 for k in steps)
    sections = all(isinstance(section, dict | None) for section in recipe.values())
    return counts and sections and isinstance(sidecar.get("teacher"), str)


def newest_grid(run: Path, counts: Sequence[int]) -> Path | None:
    """The last sample grid at the student's largest step count."""
    grids = sorted((run / "samples").glob(f"step-*-at-{max(counts)}.png"))
    return grids[-1] if grids else None


def write_card(facts: Facts, licence: Licence) -> str:
    """The card as Markdown with front matter."""
    sections = [
        f"# {title(facts)}",
        method(facts),
        f"![Samples, one for each prompt or label]({GRID})" if facts.grid else "",
        f"## Use\n\n```python\n{snippet(facts)}\n```",
        training(facts),
        quality(facts),
        tuned(facts),
        limitations(facts),
        licence_section(facts, licence),
        citation(facts),
    ]
    return f"---\n{metadata(facts, licence)}\n---\n" + "\n\n".join(s for s in sections if s) + "\n"


def title(facts: Facts) -> str:
    return f"A {max(facts.counts)}-step student of {teacher_name(facts)}"


def teacher_name(facts: Facts) -> str:
    """The teacher's Hub id; of a local folder, its last part alone."""
    local = folder_of(facts.teacher) is not None or hub_id(facts.teacher) is None
    return Path(facts.teacher).name if local else facts.teacher


def metadata(facts: Facts, licence: Licence) -> str:
    """The front matter's YAML, in the Hub's terms."""
    from huggingface_hub import EvalResult, ModelCardData

    base, results = hub_id(facts.teacher), []
    metrics = facts.summary.get("metrics") or {}
    held_out = facts.summary.get("held_out", {})  # a Hub's list of figures is a headline
    for steps, row in metrics.get("student", {}).items():
        results += [
            EvalResult(
                task_type=facts.task,
                dataset_type=row["protocol"],
                dataset_name=f"{row['protocol']} ({row['n']} samples, {row['seeds']} seeds)",
                metric_type=key,
                metric_name=f"{catalogue.label(key)}, {steps_of([steps])}",
                metric_value=round(row[key], 6),
            )
            for key in catalogue.columns(row)
            if held_out.get(key, True)
        ]
    parameters: dict[str, Any] = {"num_inference_steps": advised(facts.counts, facts.summary)}
    data = ModelCardData(
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        library_name="diffusers",
        pipeline_tag=facts.task,
        base_model=base,
        base_model_relation=None if base is None else ("adapter" if facts.adapter else "finetune"),
        tags=["fewstep", "distillation", "few-step", facts.objective.split(":")[-1]]
        + ["lora"] * facts.adapter,
        inference={"parameters": parameters | guidance_arguments(facts)},
        model_name=facts.where.rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def guidance_arguments(facts: Facts) -> dict[str, float]:
    """The argument that turns off the pipeline's guidance, which is built into the student."""
    if not facts.text:
        return {}
    gamma = facts.sidecar.get("gamma")
    eta = {} if gamma is None else {"eta": float(gamma)}
    if facts.guided or facts.read_scale is not None:  # an input of the network, or guidance
        return {"guidance_scale": facts.guidance, **eta}
    kind = str(facts.index.get("_class_name", ""))
    if kind.startswith("QwenImage"):
        return {"true_cfg_scale": 1.0}
    if kind.startswith("ZImage"):  # its scale is g - 1
        return {"guidance_scale": 0.0}
    if kind.startswith("Flux"):  # its scale is a condition of the network, not guidance
        return {"guidance_scale": facts.guidance}
    return {"guidance_scale": 1.0, **eta}


def snippet(facts: Facts) -> str:
    """A few lines of Python that load the student and save an image."""
    prompt = "two red circles on the left" if facts.teacher == "shapes" else "a lighthouse at dusk"
    call = [json.dumps(prompt)] if facts.text else ["batch_size=16"]
    if facts.pictures:
        call = [f"prompt={call[0]}", *(f"{k}={v}" for k, v in facts.pictures.items())]
    call += ["class_labels=[3] * 16"] * facts.classes
    call += [f"num_inference_steps={advised(facts.counts, facts.summary)}"]
    call += [f"{k}={v}" for k, v in guidance_arguments(facts).items()]
    options = f", revision={facts.revision!r}" * (facts.revision != "main")
    options += ", trust_remote_code=True" * facts.has_code
    extra = "\nfrom diffusers.utils import load_image" if facts.pictures else ""
    field = "frames[0]" if facts.task == "text-to-video" else "images"
    return f"""import torch
from diffusers import DiffusionPipeline{extra}
pipe = DiffusionPipeline.from_pretrained({json.dumps(facts.where)}{options})
generator = torch.Generator().manual_seed(0)
images = pipe({", ".join(call)}, generator=generator).{field}
images[0].save("sample.png")"""


def method(facts: Facts) -> str:
    paper = PAPERS.get(facts.objective)
    link = f" ([{paper.title}](https://arxiv.org/abs/{paper.arxiv}))" if paper else ""
    return (
        "Distilled by [fewstep](https://pypi.org/project/fewstep/) "
        f"with `{facts.objective}`{link}. It is trained for {steps_of(facts.counts)}, and for no "
        "other step count. The scheduler it needs is in this folder; diffusers "
        f"{since(facts)} or later draws it."
    )


def since(facts: Facts) -> str:
    """The first diffusers that draws the student's pictures; see docs/sharing.md."""
    kind = str(facts.index.get("_class_name", ""))
    return "0.39" if kind.startswith(LATE) else "0.36"


def training(facts: Facts) -> str:
    """The section on teacher, guidance, data, duration and cost."""
    g = facts.guidance
    scale = "unguided (g = 1)" if g == 1 else f"guidance scale g = {g:g} (g = 1 + w; 1 is unguided)"
    places = [facts.setting("data", key) for key in ("source", "captions", "prompts")]
    source = next(filter(None, places), None)
    data = f"`{Path(str(source)).name if folder_of(str(source)) else source}`" if source else "none"
    if source == "pairs":
        data = "the teacher's own samples, each with its noise"
    sampled = "The student is sampled without guidance."
    if facts.guided:
        sampled = "The student is sampled with the same guidance, in two passes for each step."
    if facts.read_scale is not None:
        low, high = facts.read_scale
        sampled = f"The student reads a `guidance_scale` from {low:g} to {high:g} in one pass."
    lines = [
        f"- **Teacher**: {teacher_name(facts)}, {scale}. {sampled}",
        *lora_lines(facts),
        *[f"- **Weights**: {line}." for line in weight_lines(facts)],
        f"- **Data**: {data}.",
    ]
    if summary := facts.summary:
        batch = facts.setting("train", "batch")
        size = f" of {batch} samples" if batch else ""
        lines += [
            f"- **Training**: {summary['steps']} steps{size}, seed {summary.get('seed', 0)}.",
            f"- **Cost**: {cost(summary)}.",
        ]
    return "## Training\n\n" + "\n".join(lines)


def weight_lines(facts: Facts) -> list[str]:
    """What the weights are, where they are not those of the training's end."""
    lines = [line for key in ("average", "rounded") if (line := facts.sidecar.get(key))]
    if number := facts.setting("student", "format"):
        bits = number["weights"]
        lines.append(f"trained through {bits} bits, and rounded to them in floating point")
    return lines


def lora_lines(facts: Facts) -> list[str]:
    """What the card says of LoRA files in the teacher's weights."""
    adapters = facts.setting("teacher", "adapters") or []
    if not adapters:
        return []
    names = ", ".join(f"`{Path(str(a['file'])).name}` at {a['strength']:g}" for a in adapters)
    return [
        f"- **LoRA files in the teacher**: {names}. They are in the student too; their licences "
        "apply to it."
    ]


def cost(summary: Mapping[str, Any]) -> str:
    """Device-hours over all processes, the device and the network evaluations."""
    device, processes = str(summary.get("device", "")), summary.get("processes", 1)
    kind = "GPU-hours" if device.startswith("cuda") else "CPU-hours"
    hours = summary["wall_s"] * processes / 3600
    several = f", {processes} processes" * (processes > 1)
    evaluations = summary.get("network_evaluations")
    count = f", {evaluations:,} network evaluations" if evaluations else ""
    return f"{hours:.2g} {kind} on {device or 'an unnamed device'}{several}{count}"


def quality(facts: Facts) -> str:
    """The section with the metrics, their protocol and seeds."""
    metrics = facts.summary.get("metrics")
    if not metrics:
        return "## Quality\n\nNot measured." if facts.summary else ""
    rows = rows_of(metrics)
    student = rows[0].figures
    seeds = f"{many(student['seeds'], 'seed')} for the student"
    if full := metrics.get("teacher"):
        seeds += f" and {full['seeds']} for the teacher"
    keys = catalogue.columns(student)
    heads = ["", "evaluations", *map(catalogue.label, keys)]
    table = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row.name, f"{row.evaluations:.4g}", *(figure(row.figures, k) for k in keys)]
        table.append("| " + " | ".join(cells) + " |")
    return (
        f"## Quality\n\nProtocol `{student['protocol']}`: {student['n']} samples, {seeds}; "
        f"{SPREAD}. Evaluations are network evaluations per image.\n\n"
        + "\n\n".join(filter(None, ("\n".join(table), not_held_out(facts.summary))))
    )


def tuned(facts: Facts) -> str:
    """The section on what a tuned student kept and gained."""
    if facts.tuning is None:
        return ""
    table = ["| | " + " | ".join(HEADS) + " |", "|---" * (len(HEADS) + 1) + "|"]
    table += [f"| {name} | {' | '.join(row)} |" for name, row in facts.tuning.rows]
    return f"## Tuning\n\n{facts.tuning.sentence}\n\n" + "\n".join(table)


def figure(row: Mapping[str, Any], key: str) -> str:
    """A metric with its spread over seeds; empty if the row does not have it."""
    spread = row.get("spread", {}).get(key)
    if key not in row:
        return ""
    shown = f" ± {catalogue.written(key, spread)}" if spread and row.get("seeds", 1) > 1 else ""
    return catalogue.written(key, row[key]) + shown


def limitations(facts: Facts) -> str:
    prompts = " and negative prompts have no effect" if facts.text else " has no effect"
    one = "" if not facts.stretched or 1 in facts.counts else (
        "- It has no schedule of one step: at `num_inference_steps=1` the stock pipeline stops "
        "with an IndexError.\n"
    )  # fmt: skip
    return (
        "## Limitations\n\n"
        f"- Other step counts than {numbers(facts.counts)} and other schedulers give poor images.\n"
        f"{one}"
        f"- Guidance is built in; a guidance scale{prompts}.\n"
        "- It has the biases and gaps of its teacher, and usually less diversity: compare recall "
        "and coverage, if they are given above.\n"
        "- It is trained at its teacher's resolution and not tested at others."
    )


def numbers(counts: Sequence[int]) -> str:
    """Step counts in words: "1, 2 and 4"."""
    *rest, last = map(str, sorted(counts))
    return f"{', '.join(rest)} and {last}" if rest else last


def licence_section(facts: Facts, licence: Licence) -> str:
    link = f" ({licence.link})" if licence.link else ""
    lines = [f"The student inherits the teacher's licence: **{licence.label}**{link}."]
    if licence.id is None:
        lines = ["The teacher states no licence; ask its owner before you use or share this."]
    weaker = Licence() if facts.weaker is None else licence_of(facts.weaker)
    if licence.forbids or weaker.forbids:
        subject = "It" if licence.forbids else f"That of the model that guided it ({weaker.label})"
        reason = f"the student is shared because: {facts.override}."
        lines.append(f"{subject} forbids derivatives; {reason}")
    return "## Licence\n\n" + " ".join(lines)


def citation(facts: Facts) -> str:
    paper = PAPERS.get(facts.objective)
    if paper is None:
        return ""
    return f"## Citation\n\n```bibtex\n{paper.bibtex(facts.objective)}\n```"
