"""The names that recipes can use: objectives, students, recipes, teachers, metrics, protocols."""

from __future__ import annotations

import itertools
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.objectives.base import Objective


def objectives() -> dict[str, str]:
    from distill.config.objectives import OBJECTIVES
    from distill.publish.papers import PAPERS

    papers = {k: f" arXiv:{paper.arxiv}." for k, paper in PAPERS.items()}
    return {
        k: f"{description(v)}{papers.get(k, '')} {NEEDS[data_needs(v)]}"
        for k, v in OBJECTIVES.items()
    }


def students() -> dict[str, str]:
    from distill.config.systems import SYSTEMS

    return {k: f"{v.does} arXiv:{v.arxiv}. Recipe {v.recipe}." for k, v in SYSTEMS.items()}


def data_needs(kind: type[Objective]) -> str:
    """The objective's `needs_data`; "always" if it requires a critic, which needs data."""
    from distill.config.objective_schema import networks_of

    critic_required = networks_of(kind).get("critic", False)
    return "always" if kind.needs_data == "critic" and critic_required else kind.needs_data


NEEDS = {
    "always": "Needs data.",
    "never": "Needs no data.",
    "critic": "Needs data if it has a critic.",
    "pairs": "Needs pairs, which the teacher makes.",
}


def description(kind: type) -> str:
    """The first sentence of a class's docstring, or of its module's if the class has none."""
    doc = kind.__doc__ or ""
    if doc.startswith(f"{kind.__name__}("):  # the signature that a dataclass gets instead
        doc = ""
    return sentence(doc or sys.modules[kind.__module__].__doc__ or "")


def sentence(text: str) -> str:
    """The first sentence of a text, on one line; its first paragraph if no sentence ends there."""
    paragraph = text.strip().partition("\n\n")[0]
    end = re.search(r"[.!?](?=\s*\n| [^a-z\d]|$)", paragraph)  # not in "1.5" or "et al. 2024"
    return " ".join(paragraph[: end.end() if end else None].split())


def recipes() -> dict[str, str]:
    from distill.config.recipe import SHIPPED, shipped

    return {
        k: sentence(header((SHIPPED / f"{k}.yaml").read_text(encoding="utf-8"))) for k in shipped()
    }


def header(text: str) -> str:
    """The comment at the start of a file."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return "\n".join(line.removeprefix("#").strip() for line in lines)


def teachers() -> dict[str, str]:
    from teachers.analytic import ANALYTIC
    from teachers.catalogue.loading import families

    names = {
        "digits": "shipped: class-conditional, 8×8 handwritten digits",
        "shapes": "shipped: text to 32×32 images of coloured shapes, a StableDiffusionPipeline",
    }
    names |= {f"analytic:{k}": "a distribution in closed form, for tests" for k in ANALYTIC}
    names["NAME.pkl"] = "a published EDM or EDM2 network, or its folder from `distill convert`"
    names["FILE.pt"] = "a published SiT, LightningDiT or U-ViT of ImageNet, with teacher.vae"
    names["FILE.safetensors"] = "a single file of Stable Diffusion 1.x or 2.x, SDXL, SD3 or FLUX.1"
    names["FILE.py:FUNCTION"] = "your own function that returns a Teacher (docs/teachers.md)"
    return names | dict.fromkeys(
        families(), "a diffusers folder or Hub repository with this pipeline"
    )


def metrics() -> dict[str, str]:
    from eval.catalogue import described

    return described()


def protocols() -> dict[str, str]:
    from eval.protocols.measure import PROTOCOLS

    return {k: sentence(v.__doc__ or "") for k, v in PROTOCOLS.items()}


KINDS = {f.__name__: f for f in (objectives, students, recipes, teachers, metrics, protocols)}
