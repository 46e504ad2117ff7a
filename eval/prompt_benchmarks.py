"""Prompts of GenEval and DPG-Bench, and images in the folders that their scorers read.

The scorers use detectors and question answering with requirements of their own, so they run
elsewhere. GenEval (Ghosh et al. 2023, arXiv:2310.11513) has 553 prompts and DPG-Bench (Hu et al.
2024, arXiv:2403.05135) has 1,065; both need four images of each.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eval import text
from eval.errors import MetricError
from eval.images import is_hidden
from eval.samples import Samples, by_prompt, pillow_images

IMAGES_PER_PROMPT = 4


class BenchmarkPrompt(NamedTuple):
    """A prompt of a benchmark.

    name: the name of its file or folder.
    line: its metadata for the scorer.
    """

    name: str
    prompt: str
    line: dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's prompts, and the layout of its images.

    read: from the file or folder that its authors publish to the prompts.
    last_file: the file that exists when all images of a prompt have been written.
    write: writes the images (4, 3, H, W) of a prompt to a folder.
    """

    read: Callable[[Path], list[BenchmarkPrompt]]
    last_file: Callable[[BenchmarkPrompt, Path], Path]
    write: Callable[[BenchmarkPrompt, Tensor, Path], None]


def geneval_prompts(path: Path) -> list[BenchmarkPrompt]:
    """The lines of GenEval's `evaluation_metadata.jsonl`.

    Raises:
        MetricError: it is not that file.
    """
    try:
        texts = text.lines(text.decoded(path.read_bytes()))
        lines = [text.json_value(line) for line in texts if line.strip()]
    except (OSError, ValueError) as error:
        raise MetricError(f"geneval: {path}: expected its evaluation_metadata.jsonl") from error
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
            raise MetricError(f"geneval: {path}: line {number} holds no prompt; download it again")
    return [BenchmarkPrompt(f"{i:05}", line["prompt"], line) for i, line in enumerate(lines)]


def dpg_prompts(folder: Path) -> list[BenchmarkPrompt]:
    """The prompts of DPG-Bench's folder, which has a .txt for each.

    Raises:
        MetricError: one of them is empty or not text.
    """
    texts = {}
    for file in folder.glob("*.txt"):
        if is_hidden(file.name):
            continue
        try:
            texts[file.stem] = text.decoded(file.read_bytes()).strip()
        except OSError as error:
            raise MetricError(f"dpg: {file}: {error.strerror}; make it readable") from error
        except ValueError as error:
            raise MetricError(f"dpg: {file} {error}") from error
    if empty := next((k for k, v in texts.items() if not v), None):
        raise MetricError(f"dpg: {folder / empty}.txt holds no prompt; download it again")
    return [BenchmarkPrompt(name, texts[name], {}) for name in sorted(texts)]


def write_geneval(prompt: BenchmarkPrompt, images: Tensor, folder: Path) -> None:
    """Write `00000/samples/00000.png` … and, after all of them, `00000/metadata.jsonl`."""
    metadata = geneval_last_file(prompt, folder)
    (metadata.parent / "samples").mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(pillow_images(images)):
        image.save(metadata.parent / "samples" / f"{i:05}.png")
    draft = metadata.with_suffix(".part")
    draft.write_text(json.dumps(prompt.line), encoding="utf-8")
    draft.rename(metadata)


def geneval_last_file(prompt: BenchmarkPrompt, folder: Path) -> Path:
    return folder / prompt.name / "metadata.jsonl"


def write_dpg(prompt: BenchmarkPrompt, images: Tensor, folder: Path) -> None:
    """Write `<name>.png`: the four images as two rows of two."""
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{prompt.name}.part"
    pillow_images(grid(images)[None])[0].save(draft, format="png")
    draft.rename(dpg_last_file(prompt, folder))


def dpg_last_file(prompt: BenchmarkPrompt, folder: Path) -> Path:
    return folder / f"{prompt.name}.png"


BENCHMARKS = {
    "dpg": Benchmark(dpg_prompts, dpg_last_file, write_dpg),
    "geneval": Benchmark(geneval_prompts, geneval_last_file, write_geneval),
}


def geneval(samples: Samples, metadata: list[dict[str, Any]], folder: Path) -> None:
    """Write `00000/metadata.jsonl` and `00000/samples/00000.png` … for each prompt, by its number.

    Args:
        metadata: the lines of `evaluation_metadata.jsonl`, in order.

    Raises:
        MetricError: a prompt has no image, or an image belongs to no prompt.
    """
    indices = _indices(samples, [line["prompt"] for line in metadata], "geneval")
    for number, line in enumerate(metadata):
        images = samples.images[indices[line["prompt"]]]
        write_geneval(BenchmarkPrompt(f"{number:05}", line["prompt"], line), images, folder)


def dpg(samples: Samples, prompts: dict[str, str], folder: Path) -> None:
    """Write `<name>.png` for each prompt: its four images as two rows of two.

    Give the scorer the side of one image as the resolution.

    Args:
        prompts: each prompt's text, by the stem of its file.

    Raises:
        MetricError: a prompt has no image, an image no prompt, or a prompt not four images.
    """
    indices = _indices(samples, list(prompts.values()), "dpg")
    for name, prompt in prompts.items():
        if (n := len(indices[prompt])) != IMAGES_PER_PROMPT:
            raise MetricError(f"dpg: {n} images of {name}; sample {IMAGES_PER_PROMPT} of each")
        write_dpg(BenchmarkPrompt(name, prompt, {}), samples.images[indices[prompt]], folder)


def grid(images: Tensor) -> Tensor:
    """Four images (4, C, H, W) as one (C, 2H, 2W), row by row."""
    a, b, c, d = images
    return torch.cat([torch.cat([a, b], dim=2), torch.cat([c, d], dim=2)], dim=1)


def _indices(samples: Samples, prompts: list[str], benchmark: str) -> dict[str, list[int]]:
    indices = by_prompt(samples.prompts)
    if missing := set(prompts) - set(indices):
        raise MetricError(f"{benchmark}: no image of {min(missing)!r}; sample every prompt")
    if unknown := set(indices) - set(prompts):
        raise MetricError(
            f"{benchmark}: {min(unknown)!r} is none of its prompts; sample its own prompts only"
        )
    return indices
