"""Pictures laid out as other people's scorers take them: GenEval and DPG-Bench.

Both need detectors or question answerers with requirements of their own, so they run elsewhere.
GenEval (Ghosh et al. 2023, arXiv:2310.11513) has 553 prompts, DPG-Bench (Hu et al. 2024,
arXiv:2403.05135) 1,065; both take four pictures of each.
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
from eval.samples import Samples, by_prompt, pictures

EACH = 4  # pictures of a prompt


class BenchmarkPrompt(NamedTuple):
    """A prompt of a benchmark.

    name: of its file or folder.
    line: what its scorer knows of it.
    """

    name: str
    prompt: str
    line: dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """What a scorer wants drawn, and how it wants to find it.

    read: its prompts, from the file or folder that its authors publish.
    place: what is there once a prompt's pictures are, all of them.
    write: lays the pictures (4, 3, H, W) of a prompt down in a folder.
    """

    read: Callable[[Path], list[BenchmarkPrompt]]
    place: Callable[[BenchmarkPrompt, Path], Path]
    write: Callable[[BenchmarkPrompt, Tensor, Path], None]


def geneval_prompts(path: Path) -> list[BenchmarkPrompt]:
    """The lines of GenEval's `evaluation_metadata.jsonl`.

    Raises:
        MetricError: the file is not such.
    """
    try:
        texts = text.lines(text.decoded(path.read_bytes()))
        lines = [text.json_value(line) for line in texts if line.strip()]
    except (OSError, ValueError) as error:
        raise MetricError(f"geneval: {path}: expected its evaluation_metadata.jsonl") from error
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
            raise MetricError(f"geneval: {path}: line {number} holds no prompt")
    return [BenchmarkPrompt(f"{i:05}", line["prompt"], line) for i, line in enumerate(lines)]


def dpg_prompts(folder: Path) -> list[BenchmarkPrompt]:
    """The files of DPG-Bench's folder of prompts, a .txt for each.

    Raises:
        MetricError: one of them is not text.
    """
    found = {}
    for file in folder.glob("*.txt"):
        if is_hidden(file.name):
            continue
        try:
            found[file.stem] = text.decoded(file.read_bytes()).strip()
        except OSError as error:
            raise MetricError(f"dpg: {file}: {error.strerror}; see to its permissions") from error
        except ValueError as error:
            raise MetricError(f"dpg: {file} {error}") from error
    if empty := next((k for k, v in found.items() if not v), None):
        raise MetricError(f"dpg: {folder / empty}.txt holds no prompt")
    return [BenchmarkPrompt(name, found[name], {}) for name in sorted(found)]


def write_geneval(asked: BenchmarkPrompt, images: Tensor, folder: Path) -> None:
    """`00000/samples/00000.png` … and, when they are all there, `00000/metadata.jsonl`."""
    place = geneval_place(asked, folder)
    (place.parent / "samples").mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures(images)):
        picture.save(place.parent / "samples" / f"{i:05}.png")
    aside = place.with_suffix(".part")
    aside.write_text(json.dumps(asked.line), encoding="utf-8")
    aside.rename(place)


def geneval_place(asked: BenchmarkPrompt, folder: Path) -> Path:
    return folder / asked.name / "metadata.jsonl"


def write_dpg(asked: BenchmarkPrompt, images: Tensor, folder: Path) -> None:
    """`<name>.png`: the four pictures as two rows of two."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{asked.name}.part"
    pictures(grid(images)[None])[0].save(aside, format="png")
    aside.rename(dpg_place(asked, folder))


def dpg_place(asked: BenchmarkPrompt, folder: Path) -> Path:
    return folder / f"{asked.name}.png"


BENCHMARKS = {
    "dpg": Benchmark(dpg_prompts, dpg_place, write_dpg),
    "geneval": Benchmark(geneval_prompts, geneval_place, write_geneval),
}


def geneval(samples: Samples, metadata: list[dict[str, Any]], folder: Path) -> None:
    """`00000/metadata.jsonl` and `00000/samples/00000.png` … for each prompt, by its number.

    Args:
        metadata: the lines of its `evaluation_metadata.jsonl`, in order.

    Raises:
        MetricError: a prompt of these has no picture, or a picture has none of these.
    """
    places = _places(samples, [line["prompt"] for line in metadata], "geneval")
    for number, line in enumerate(metadata):
        images = samples.images[places[line["prompt"]]]
        write_geneval(BenchmarkPrompt(f"{number:05}", line["prompt"], line), images, folder)


def dpg(samples: Samples, prompts: dict[str, str], folder: Path) -> None:
    """`<name>.png` for each prompt: its four pictures as two rows of two.

    Its scorer is to be given the side of one picture as the resolution.

    Args:
        prompts: each prompt's text, by the stem of its file.

    Raises:
        MetricError: a prompt has no picture, a picture no prompt, or a prompt not four pictures.
    """
    places = _places(samples, list(prompts.values()), "dpg")
    for name, prompt in prompts.items():
        if len(places[prompt]) != EACH:
            raise MetricError(f"dpg: {len(places[prompt])} pictures of {name}; draw four of each")
        write_dpg(BenchmarkPrompt(name, prompt, {}), samples.images[places[prompt]], folder)


def grid(images: Tensor) -> Tensor:
    """Four pictures (4, C, H, W) as one (C, 2H, 2W), row by row."""
    a, b, c, d = images
    return torch.cat([torch.cat([a, b], dim=2), torch.cat([c, d], dim=2)], dim=1)


def _places(samples: Samples, wanted: list[str], benchmark: str) -> dict[str, list[int]]:
    places = by_prompt(samples.prompts)
    if missing := set(wanted) - set(places):
        raise MetricError(f"{benchmark}: no picture of {min(missing)!r}; draw every prompt")
    if strange := set(places) - set(wanted):
        raise MetricError(f"{benchmark}: {min(strange)!r} is none of its prompts; draw its own")
    return places
