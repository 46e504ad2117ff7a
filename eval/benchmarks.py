"""Pictures laid out as other people's scorers take them: GenEval and DPG-Bench.

Both need detectors or question answerers with requirements of their own, so they run elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.errors import MetricError
from eval.samples import Samples, by_prompt, pictures


def geneval(samples: Samples, metadata: list[dict[str, Any]], folder: Path) -> None:
    """`00000/metadata.jsonl` and `00000/samples/00000.png` … for each prompt, by its number.

    GenEval (Ghosh et al. 2023, arXiv:2310.11513): 553 prompts, four pictures of each.

    Args:
        metadata: the lines of its `evaluation_metadata.jsonl`, in order.

    Raises:
        MetricError: a prompt of these has no picture, or a picture has none of these.
    """
    places = _places(samples, [line["prompt"] for line in metadata], "geneval")
    for number, line in enumerate(metadata):
        here = folder / f"{number:05}"
        (here / "samples").mkdir(parents=True, exist_ok=True)
        (here / "metadata.jsonl").write_text(json.dumps(line))
        for i, picture in enumerate(pictures(samples.images[places[line["prompt"]]])):
            picture.save(here / "samples" / f"{i:05}.png")


def dpg(samples: Samples, prompts: dict[str, str], folder: Path) -> None:
    """`<name>.png` for each prompt: its four pictures as two rows of two.

    DPG-Bench (Hu et al. 2024, arXiv:2403.05135): 1,065 prompts, each a file; its scorer is to be
    given the side of one picture as the resolution.

    Args:
        prompts: each prompt's text, by the stem of its file.

    Raises:
        MetricError: a prompt has no picture, a picture no prompt, or a prompt not four pictures.
    """
    places = _places(samples, list(prompts.values()), "dpg")
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompt in prompts.items():
        if len(places[prompt]) != 4:
            raise MetricError(f"dpg: {len(places[prompt])} pictures of {name}; draw four of each")
        pictures(grid(samples.images[places[prompt]])[None])[0].save(folder / f"{name}.png")


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
