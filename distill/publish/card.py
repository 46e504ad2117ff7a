"""The model card of a student, written from its run: what it is, what it cost, what it may be.

The front matter follows the Hub's model-card specification, so that the Hub links the student to
its base model, shows its licence, and lists its figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.publish.licence import Licence, check_licence, folder_of, hub_id, licence_of
from distill.publish.papers import PAPERS
from distill.publish.results_table import SPREAD, advised, many, rows_of, steps_of
from eval import catalogue
from teachers.errors import UserError, intact
from teachers.storage.files import read_json

GRID = "grid.png"  # the sample grid's name beside the card


# The figures a card shows, in this order, of those that the protocol gives.
# ---- licences


# ---- the card


@dataclass(frozen=True)
class Card:
    """A card with what belongs beside it."""

    text: str
    grid: Path | None  # a picture of samples, to lie beside it as grid.png
    licence: Licence


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Attributes:
        index: The exported pipeline's model_index.json.
        sidecar: Its fewstep.json: steps, teacher, recipe.
        summary: The run's summary.json; empty before the run is measured.
        where: What the snippet loads: a Hub id, or a folder.
        own: Whether the folder holds its network's source, which diffusers runs only when told to.
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
    own: bool = False

    def setting(self, section: str, key: str, default: Any = None) -> Any:
        part = self.sidecar.get("recipe", {}).get(section) or {}
        return part.get(key, default)

    @property
    def guidance(self) -> float:
        """The scale g of the teacher's; in the recipe it may be a mapping's."""
        how = self.setting("teacher", "guidance", 1.0)
        return float(how["scale"] if isinstance(how, dict) else how)

    @property
    def weaker(self) -> str | None:
        """The network that guided the teacher, under autoguidance."""
        how = self.setting("teacher", "guidance")
        return how.get("weaker") if isinstance(how, dict) else None

    @property
    def counts(self) -> list[int]:
        return self.sidecar["steps"]

    @property
    def teacher(self) -> str:
        return str(self.sidecar["teacher"])

    @property
    def objective(self) -> str:
        return str(self.setting("objective", "name", "an objective of its own"))

    @property
    def text(self) -> bool:
        """Whether prompts are what it is conditioned on."""
        return "tokenizer" in self.index

    @property
    def task(self) -> str:
        if not self.text:
            return "unconditional-image-generation"
        video = str(self.index.get("_class_name", "")).startswith("Wan")
        return "text-to-video" if video else "text-to-image"


def require_finished(run: Path) -> None:
    """Refuse a folder that does not hold a finished run.

    Raises:
        UserError: it is no run, or its training or measuring has not come to its end.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"run {str(run)!r}: no run is there; give a folder that `distill run` made")
    if not (run / "summary.json").is_file() or not (run / "student").is_dir():
        raise UserError(f"run {str(run)!r} is not finished; go on with `distill run … --resume`")
    summary = read_json(run / "summary.json", f"run {str(run)!r}")
    if lacking := sorted({"steps", "wall_s", "metrics"} - summary.keys()):
        raise UserError(f"run {str(run)!r}: summary.json is damaged: it lacks {', '.join(lacking)}")


def card(run: Path, repo: str = "", licence_override: str = "", revision: str = "main") -> Card:
    """The card of a finished run.

    Args:
        repo: The Hub id that the snippet loads; without one, the run's student folder.
        licence_override: As for `check_licence`; a recipe's export.licence_override serves too.

    Raises:
        UserError: the run is not finished or not whole, or a licence forbids it: the teacher's, or
            that of the weaker network that guided it.
    """
    require_finished(run)
    summary = read_json(run / "summary.json", f"run {str(run)!r}")
    facts = facts_of(run / "student", summary, repo or str(run / "student"), revision)
    grid = newest_grid(run, facts.counts)
    override = licence_override or str(facts.setting("export", "licence_override", "") or "")
    licence = check_licence(facts.teacher, override)
    if facts.weaker is not None:
        check_licence(facts.weaker, override)
    adapter = any((run / "lora").glob("*.safetensors"))
    made = {**vars(facts), "grid": grid is not None, "override": override}
    with intact(run / "summary.json"):
        text = written(Facts(**{**made, "adapter": adapter or facts.adapter}), licence)
    return Card(text, grid, licence)


def draft(folder: Path) -> str:
    """The card of a freshly exported folder, before it is measured."""
    facts = facts_of(folder, {})
    return written(facts, licence_of(facts.teacher))


def facts_of(
    folder: Path, summary: dict[str, Any], where: str = Facts.where, revision: str = "main"
) -> Facts:
    """What an exported folder says of itself."""
    who = f"student {str(folder)!r}"
    sidecar = read_json(folder / "fewstep.json", who)
    steps, recipe = sidecar.get("steps"), sidecar.get("recipe")
    whole = isinstance(steps, list) and steps and all(type(k) is int and k > 0 for k in steps)
    sections = [*recipe.values()] if isinstance(recipe, dict) else ["no sections"]
    whole = whole and all(isinstance(section, dict | None) for section in sections)
    if not whole or not isinstance(sidecar.get("teacher"), str):
        raise UserError(f"{who}: fewstep.json is damaged; export the run again")
    config = folder / "unet" / "config.json"
    classes = config.is_file() and bool(read_json(config, who).get("num_class_embeds"))
    lora = (folder / "pytorch_lora_weights.safetensors").is_file()
    index = read_json(folder / "model_index.json", who)
    own = any(folder.glob("*/*.py"))
    return Facts(index, sidecar, summary, where, revision, classes, lora, own=own)


def newest_grid(run: Path, counts: Sequence[int]) -> Path | None:
    """The last sample grid, at the most steps the student takes."""
    grids = sorted((run / "samples").glob(f"step-*-at-{max(counts)}.png"))
    return grids[-1] if grids else None


def written(facts: Facts, licence: Licence) -> str:
    """Front matter and text."""
    parts = [
        f"# {title(facts)}",
        method(facts),
        "![Samples, one for each prompt or label](" + GRID + ")" if facts.grid else "",
        f"## Use\n\n```python\n{snippet(facts)}\n```",
        training(facts),
        quality(facts),
        limitations(facts),
        licensed(facts, licence),
        citation(facts),
    ]
    return f"---\n{metadata(facts, licence)}\n---\n" + "\n\n".join(p for p in parts if p) + "\n"


def title(facts: Facts) -> str:
    return f"A {max(facts.counts)}-step student of {named(facts)}"


def named(facts: Facts) -> str:
    """The teacher without this machine's folders in it."""
    local = folder_of(facts.teacher) is not None or hub_id(facts.teacher) is None
    return Path(facts.teacher).name if local else facts.teacher


def metadata(facts: Facts, licence: Licence) -> str:
    """The front matter's YAML, in the Hub's terms."""
    from huggingface_hub import EvalResult, ModelCardData

    base, results = hub_id(facts.teacher), []
    metrics = facts.summary.get("metrics") or {}
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
    """How this pipeline is told not to guide: what it guides by is in the student already."""
    if not facts.text:
        return {}
    kind = str(facts.index.get("_class_name", ""))
    if kind.startswith("QwenImage"):
        return {"true_cfg_scale": 1.0}
    if kind.startswith("ZImage"):  # it counts from 0
        return {"guidance_scale": 0.0}
    if kind.startswith("Flux"):  # there it is a condition of the network, not a second pass
        return {"guidance_scale": facts.guidance}
    return {"guidance_scale": 1.0}


def snippet(facts: Facts) -> str:
    """Six lines that load the student and save a picture."""
    asked = "two red circles on the left" if facts.teacher == "shapes" else "a lighthouse at dusk"
    call = [json.dumps(asked)] if facts.text else ["batch_size=16"]
    call += ["class_labels=[3] * 16"] * facts.classes
    call += [f"num_inference_steps={advised(facts.counts, facts.summary)}"]
    call += [f"{k}={v}" for k, v in guidance_arguments(facts).items()]
    branch = f", revision={facts.revision!r}" * (facts.revision != "main")
    branch += ", trust_remote_code=True" * facts.own
    which = "frames" if facts.task == "text-to-video" else "images"
    return f"""import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({json.dumps(facts.where)}{branch})
generator = torch.Generator().manual_seed(0)
images = pipe({", ".join(call)}, generator=generator).{which}{"[0]" * (which == "frames")}
images[0].save("sample.png")"""


def method(facts: Facts) -> str:
    paper = PAPERS.get(facts.objective)
    cited = f" ([{paper.title}](https://arxiv.org/abs/{paper.arxiv}))" if paper else ""
    *most, last = map(str, facts.counts)
    counts = f"{', '.join(most)} or {last}" if most else last
    plural = "s" * (facts.counts != [1])
    return (
        "Distilled by [fewstep](https://pypi.org/project/fewstep/) "
        f"with `{facts.objective}`{cited}. It is sampled in {counts} step{plural}, for which it "
        "was trained, and in no other number; its scheduler lies in this folder."
    )


def training(facts: Facts) -> str:
    """Teacher, guidance, data, length and cost."""
    g = facts.guidance
    guided = "unguided (g = 1)" if g == 1 else f"guided at g = {g:g} (g = 1 + w; 1 is unguided)"
    source = facts.setting("data", "source") or facts.setting("data", "prompts")
    data = f"`{Path(str(source)).name if folder_of(str(source)) else source}`" if source else "none"
    lines = [
        f"- **Teacher**: {named(facts)}, {guided}. The student is sampled without guidance.",
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


def cost(summary: Mapping[str, Any]) -> str:
    """Hours of all processes together."""
    device, processes = str(summary.get("device", "")), summary.get("processes", 1)
    kind = "GPU-hours" if device.startswith("cuda") else "CPU-hours"
    hours = summary["wall_s"] * processes / 3600
    shared = f", {processes} processes" * (processes > 1)
    evaluations = summary.get("network_evaluations")
    count = f", {evaluations:,} network evaluations" if evaluations else ""
    return f"{hours:.2g} {kind} on {device or 'an unnamed device'}{shared}{count}"


def quality(facts: Facts) -> str:
    """The figures, with the protocol and seeds they are of."""
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
        f"{SPREAD}. Evaluations are of the network, for one picture.\n\n" + "\n".join(table)
    )


def figure(row: Mapping[str, Any], key: str) -> str:
    spread = row.get("spread", {}).get(key)
    if key not in row:
        return ""
    shown = f" ± {catalogue.written(key, spread)}" if spread and row.get("seeds", 1) > 1 else ""
    return catalogue.written(key, row[key]) + shown


def limitations(facts: Facts) -> str:
    prompts = " and negative prompts have no effect" if facts.text else " has no effect"
    return (
        "## Limitations\n\n"
        f"- Other step counts and other schedulers than the ones above give poor pictures.\n"
        f"- Guidance is built in; a guidance scale{prompts}.\n"
        "- It has its teacher's biases and gaps, and usually less variety than its teacher: "
        "compare recall above, where it is given.\n"
        "- It was trained at its teacher's resolution and is not tested at others."
    )


def licensed(facts: Facts, licence: Licence) -> str:
    link = f" ({licence.link})" if licence.link else ""
    lines = [f"The teacher's, which a student inherits: **{licence.called}**{link}."]
    if licence.id is None:
        lines = ["The teacher states none; ask its owner before you share or use this."]
    guide = Licence() if facts.weaker is None else licence_of(facts.weaker)
    if licence.forbids or guide.forbids:
        whose = "It" if licence.forbids else f"That of what guided the teacher ({guide.called})"
        lines.append(f"{whose} forbids derivatives; this one is shared because: {facts.override}.")
    return "## Licence\n\n" + " ".join(lines)


def citation(facts: Facts) -> str:
    paper = PAPERS.get(facts.objective)
    if paper is None:
        return ""
    return f"## Citation\n\n```bibtex\n{paper.bibtex(facts.objective)}\n```"
