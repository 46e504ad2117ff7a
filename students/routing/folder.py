"""The folder of routed students: a stock folder of each, the rule, and the pipeline's source."""

from __future__ import annotations

import ast
import inspect
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from students.export.folder import (
    ROUTER,
    ExportError,
    drawn_apart,
    load_student,
    noise_of,
    pixel_difference,
    prompts_of,
    request,
    sample_student,
)
from students.generator import Generator
from students.routing import rule as rule_file
from students.routing.rule import expert_of
from teachers.errors import UserError
from teachers.quantised import Precision
from teachers.storage.files import open_to_readers, read_json
from teachers.teacher import Teacher

HEADER = '''"""Several students of one teacher, each for a part of its conditions; Apache-2.0.

Load the whole folder: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).
"""
'''


@dataclass(frozen=True)
class Routed:
    """Students of one teacher, each for a part of its conditions.

    Attributes:
        experts: Each student's generator, and its folder as a teacher.
        rule: As `expert_of` takes it.
    """

    experts: list[tuple[Generator, Teacher]]
    rule: dict[str, Any]

    @property
    def counts(self) -> tuple[int, ...]:
        return self.experts[0][0].counts

    @torch.no_grad()
    def samples(
        self, prompts: Sequence[Any], seed: int, steps: int, batch: int
    ) -> list[tuple[list[int], Tensor, Teacher]]:
        """Places in `prompts`, x̂ (N, ...) for these, and whose codec decodes it, of each student.

        The noise is that which the exported pipeline draws: its seed is drawn for each picture.

        Raises:
            UserError: no student has learned one of the prompts.
        """
        try:
            chosen = [expert_of(prompt, self.rule) for prompt in prompts]
        except ValueError as error:
            raise UserError(f"prompts: {error}; give others") from None
        rng, made = torch.Generator().manual_seed(seed), []
        seeds = torch.randint(2**62, (len(prompts),), generator=rng).tolist()
        for number, (generator, teacher) in enumerate(self.experts):
            places = [i for i, k in enumerate(chosen) if k == number]
            if not places:
                continue
            few_step = generator.at(steps)
            drawn = [noise_of(few_step, teacher, 1, seeds[i]) for i in places]
            noise = [torch.cat(parts) for parts in zip(*drawn, strict=True)]
            part = [prompts[i] for i in places]
            x = sample_student(few_step, teacher, part, seed, batch, noise=noise)
            made.append((places, x, teacher))
        return made


def is_routed(folder: Path) -> bool:
    """Whether a folder is one of routed students."""
    return (folder / ROUTER).is_file()


def load(folder: Path, precision: Precision | None = None) -> Routed:
    """The routed students of a folder.

    Raises:
        UserError: it is damaged.
    """
    about = read_json(folder / ROUTER, f"routed students {str(folder)!r}")
    rule = about.get("rule")
    if not isinstance(rule, dict) or not isinstance(rule.get("parts"), list):
        raise UserError(f"{folder}: {ROUTER} is damaged; make it again by distill route")
    places = [folder / f"expert_{number}" for number in range(len(rule["parts"]))]
    return Routed([load_student(place, precision) for place in places], rule)


def write(students: Sequence[Path], routed: Routed, path: Path, about: Mapping[str, Any]) -> None:
    """Write routed students to `path`, which appears only if stock diffusers draws what we draw.

    Args:
        students: The folders of `routed.experts`.
        about: Further content of router.json.

    Raises:
        ExportError: the pictures differ, or the folder does not load.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}-{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        index: dict[str, Any] = {"_class_name": [f"routed_{len(students)}", "RoutedPipeline"]}
        for number, student in enumerate(students):
            shutil.copytree(student, draft / f"expert_{number}")
            kind = read_json(student / "model_index.json", f"student {str(student)!r}")
            index["_diffusers_version"] = kind["_diffusers_version"]
            index[f"expert_{number}"] = ["diffusers", kind["_class_name"]]
        index["rule"] = routed.rule
        # a name for each number: diffusers gives modules of one name one namespace
        source = draft / f"{index['_class_name'][0]}.py"
        source.write_text(pipeline_source(len(students)), encoding="utf-8")
        for name, tree in (("model_index.json", index), (ROUTER, {"rule": routed.rule, **about})):
            (draft / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        open_to_readers(draft)
        verify(draft, routed)
        os.replace(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def pipeline_source(count: int) -> str:
    """One module with the rule and the pipeline, of so many students."""
    from students.routing import pipeline  # slow: it imports diffusers' pipelines

    bodies = [body(rule_file), body(pipeline)]
    imports = dict.fromkeys(line for lines, _ in bodies for line in lines)
    texts = [text for _, text in bodies]
    return "\n\n".join([HEADER + "\n".join(imports), *texts, f"named({count})\n"])


def body(module: ModuleType) -> tuple[list[str], str]:
    """A module's imports but for our own, and its source without imports and docstring."""
    text = inspect.getsource(module)
    lines, nodes = text.splitlines(), ast.parse(text).body
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    cut = {i for n in (nodes[0], *imports) for i in range(n.lineno - 1, n.end_lineno or 0)}
    others = [
        ast.unparse(n)
        for n in imports
        if not (isinstance(n, ast.ImportFrom) and (n.module or "").startswith("students"))
    ]
    return others, "\n".join(line for i, line in enumerate(lines) if i not in cut).strip()


def verify(folder: Path, routed: Routed) -> None:
    """Compare the pictures that stock diffusers makes from the folder with ours.

    Raises:
        ExportError: they differ by more than rounding, or the process fails.
    """
    generator, teacher = routed.experts[0]
    by_label = routed.rule["by"] == "labels"
    prompts = [part[0] for part in routed.rule["parts"]] + [routed.rule["parts"][0][-1]]
    _, arguments = request(generator, teacher)
    arguments = {k: v for k, v in arguments.items() if not batched(k, v, teacher)}
    job = {
        "counts": routed.counts,
        "absent": [],
        "device": next(generator.parameters()).device.type,
        "own": True,
        "seeded": True,
    }
    arguments["class_labels" if by_label else "prompt"] = prompts
    theirs = drawn_apart(folder, job, arguments, "the folder of routed students")
    for steps in routed.counts:
        ours = pictures(routed, prompts, 0, steps, len(prompts))
        if difference := pixel_difference(ours, theirs[str(steps)], generator):
            raise ExportError(f"at {steps} steps the routed pipeline {difference}")


def batched(key: str, value: Any, teacher: Teacher) -> bool:
    """Whether an argument of a pipeline is of its prompts and not of every call."""
    return key in ("prompt", "class_labels", "batch_size") or (
        isinstance(value, list) and len(value) == len(prompts_of(teacher))
    )


def pictures(routed: Routed, prompts: Sequence[Any], seed: int, steps: int, batch: int) -> Tensor:
    """Pictures (N, C, H, W) in [0, 1] for these prompts, as the pipeline's "pt" output."""
    images: list[Any] = [None] * len(prompts)
    for places, x, teacher in routed.samples(prompts, seed, steps, batch):
        decoded = torch.cat([teacher.codec.decode(part).cpu() for part in x.split(batch)])
        for place, image in zip(places, (decoded / 2 + 0.5).clamp(0, 1), strict=True):
            images[place] = image
    return torch.stack(images)
