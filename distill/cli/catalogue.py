"""What there is to choose from: objectives, recipes, teachers, metrics and protocols, by name."""

from __future__ import annotations

import itertools
import re
import sys


def objectives() -> dict[str, str]:
    from distill.objectives import OBJECTIVES

    return {k: f"{described(v)} {NEEDS[v.needs_data]}" for k, v in OBJECTIVES.items()}


NEEDS = {
    "always": "Learns from data.",
    "never": "Needs no data.",
    "critic": "Needs data where it has a critic.",
}


def described(kind: type) -> str:
    """The first sentence of a class's own docstring, or else of its module's."""
    own = kind.__doc__ or ""
    if own.startswith(f"{kind.__name__}("):  # its signature, which a dataclass without one gets
        own = ""
    return sentence(own or sys.modules[kind.__module__].__doc__ or "")


def sentence(text: str) -> str:
    """The first sentence of a text on one line, or its first paragraph if none ends there."""
    paragraph = text.strip().partition("\n\n")[0]
    ends = re.search(r"[.!?](?=\s*\n| [^a-z\d]|$)", paragraph)  # not in "1.5" or "et al. 2024"
    return " ".join(paragraph[: ends.end() if ends else None].split())


def recipes() -> dict[str, str]:
    from distill.config.recipe import SHIPPED, shipped

    return {
        k: sentence(header((SHIPPED / f"{k}.yaml").read_text(encoding="utf-8"))) for k in shipped()
    }


def header(text: str) -> str:
    """The comment that a file begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return "\n".join(line.removeprefix("#").strip() for line in lines)


def teachers() -> dict[str, str]:
    from teachers.analytic import ANALYTIC
    from teachers.catalogue.loading import families

    found = {
        "digits": "embedded: class-conditional, 8×8 handwritten digits",
        "shapes": "embedded: text to 32×32 pictures of coloured shapes, a StableDiffusionPipeline",
    }
    found |= {f"analytic:{k}": "closed form, for tests and study" for k in ANALYTIC}
    found["NAME.pkl"] = "a published EDM or EDM2 network, or the folder that `convert` makes of it"
    found["FILE.py:FUNCTION"] = "your own: a function that returns a Teacher (docs/teachers.md)"
    return found | dict.fromkeys(families(), "a diffusers folder or Hub id of this pipeline")


def metrics() -> dict[str, str]:
    from eval.catalogue import described

    return described()


def protocols() -> dict[str, str]:
    from eval.protocols.measure import PROTOCOLS

    return {k: sentence(v.__doc__ or "") for k, v in PROTOCOLS.items()}


KINDS = {f.__name__: f for f in (objectives, recipes, teachers, metrics, protocols)}
