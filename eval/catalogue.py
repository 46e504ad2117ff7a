"""Every figure that is reported: its key, its names, which way is better, its format, its paper.

Tables, cards, pages, plots and the terminal take these facts from here. A key may carry settings in
brackets, as `clip_score[MODEL, 'PREFIX', 256]` does; its facts are those of the name before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class MetricInfo:
    """The facts of one figure.

    label: its name in full, as cards and reports have it.
    summary: what it is, in one line.
    better: whether higher or lower values are better; "neither" where it is no quality.
    short: its name in tables of many columns; `label` unless given.
    narrow: its name in a terminal; `short` unless given.
    paper: the arXiv id; empty where the definition is this project's.
    unit: empty for plain numbers and for shares of 1.
    format: how a value is written, as a format specification.
    role: "main" figures are columns of tables; "detail" ones, such as a bias or a standard
        deviation, are in the JSON files alone; "cost" is what a sample takes.
    """

    label: str
    summary: str
    better: Literal["higher", "lower", "neither"]
    short: str = ""
    narrow: str = ""
    paper: str = ""
    unit: str = ""
    format: str = ".3f"
    role: Literal["main", "detail", "cost"] = "main"


def _frechet(label: str, summary: str, short: str = "", paper: str = "1706.08500") -> MetricInfo:
    return MetricInfo(label, summary, "lower", short, paper=paper)


def _bias(key: str) -> MetricInfo:
    summary = f"the {key} expected of as many independent samples of the reference"
    return MetricInfo(f"{key}, bias", summary, "neither", role="detail")


def _share(label: str, summary: str, narrow: str = "", paper: str = "") -> MetricInfo:
    return MetricInfo(label, summary, "higher", narrow=narrow, paper=paper)


def _attribute(name: str, noun: str) -> MetricInfo:
    summary = f"share of scenes in which exact code reads the {noun} of the prompt"
    return MetricInfo(f"{name} accuracy", summary, "higher", name, role="detail")


def _evaluations(label: str, summary: str) -> MetricInfo:
    return MetricInfo(label, summary, "lower", narrow="evals", format=".4g", role="cost")


# In the order of tables. The first figure that a protocol gives orders its rows: see `headline`.
CATALOGUE: dict[str, MetricInfo] = {
    "fd": _frechet("Fréchet distance", "Fréchet distance of features to the reference's", "FD"),
    "fd_second": _frechet(
        "Fréchet distance, second network", "fd, of a network of another seed and architecture",
        "FD, 2nd",
    ),
    "fid": _frechet("FID", "Fréchet distance of Inception features, by the protocol's resize"),
    "patch_fid": _frechet(
        "patch FID", "fid of central 299×299 patches, not resized", paper="2402.13929"
    ),
    "fd_dinov2": _frechet(
        "FD-DINOv2", "Fréchet distance of DINOv2 features", paper="2306.04675"
    ),
    "cmmd": MetricInfo(
        "CMMD", "Gaussian MMD of CLIP embeddings, times 1000", "lower", paper="2401.09603"
    ),
    "kid": MetricInfo(
        "KID", "unbiased cubic MMD of Inception features, not times 1000", "lower",
        paper="1801.01401",
    ),
    "fd_infinity": _frechet(
        "Fréchet distance at N = ∞", "fd extrapolated to infinitely many samples", "FD∞",
        "1911.07023",
    ),
    "fid_infinity": _frechet(
        "FID at N = ∞", "fid extrapolated to infinitely many samples", "FID∞", "1911.07023"
    ),
    "inception_score": MetricInfo(
        "inception score", "confident and varied classes, 1 to 1008; no reference", "higher", "IS",
        paper="1606.03498",
    ),
    "inception_score_infinity": MetricInfo(
        "inception score at N = ∞", "inception_score extrapolated to infinitely many samples",
        "higher", "IS∞", paper="1911.07023",
    ),
    "precision": _share(
        "precision", "share of generated samples inside some real ball", "prec.", "1904.06991"
    ),
    "recall": _share(
        "recall", "share of real samples inside some generated ball", paper="1904.06991"
    ),
    "coverage": _share(
        "coverage", "share of real samples with a generated one in their k-neighbour ball",
        "cover.", "2002.09797",
    ),
    "accuracy": _share(
        "accuracy", "share of samples that show what the prompt says: a label, a whole caption",
        "acc.",
    ),
    "clip_score": MetricInfo(
        "CLIP score", "cosine of image and prompt, by the model and prefix in brackets", "higher",
        "CLIP", paper="2104.08718",
    ),
    "pick_score": MetricInfo(
        "PickScore", "learned preference for image and prompt, near 20", "higher", "Pick",
        paper="2305.01569",
    ),
    "image_reward": MetricInfo(
        "ImageReward", "learned preference for image and prompt", "higher", "reward",
        paper="2304.05977",
    ),
    "hps_v2.1": MetricInfo(
        "HPS v2.1", "human preference score of image and prompt, times 100", "higher", "HPS",
        paper="2306.09341",
    ),
    "lpips_diversity": MetricInfo(
        "LPIPS diversity", "LPIPS over the pairs of a prompt's samples", "higher", "diversity",
        paper="1801.03924",
    ),
    "vendi": MetricInfo(
        "Vendi score", "effective number of different samples", "higher", "Vendi",
        paper="2210.02410",
    ),
    "teacher_psnr": MetricInfo(
        "PSNR to the teacher", "signal-to-noise ratio to the teacher's image of the same noise",
        "higher", "PSNR", unit="dB",
    ),
    "teacher_lpips": MetricInfo(
        "LPIPS to the teacher", "LPIPS to the teacher's image of the same noise", "lower", "LPIPS",
        paper="1801.03924",
    ),
    "variety": MetricInfo(
        "variety", "spread of images within a prompt, as a share of real ones'", "higher",
        role="detail",
    ),
    "density": MetricInfo(
        "density", "how many real balls hold each generated sample, over k", "higher",
        paper="2002.09797", role="detail",
    ),
    "shape_accuracy": _attribute("shape", "shape"),
    "colour_accuracy": _attribute("colour", "colour"),
    "count_accuracy": _attribute("count", "number"),
    "position_accuracy": _attribute("position", "place"),
    "fd_bias": _bias("fd"),
    "fd_second_bias": _bias("fd_second"),
    "fid_bias": _bias("fid"),
    "patch_fid_bias": _bias("patch_fid"),
    "fd_dinov2_bias": _bias("fd_dinov2"),
    "cmmd_unbiased": MetricInfo(
        "CMMD, unbiased", "cmmd without its bias of c / N", "lower", role="detail"
    ),
    "kid_std": MetricInfo(
        "KID, standard deviation", "standard deviation of kid over its subsets", "neither",
        role="detail",
    ),
    "inception_score_std": MetricInfo(
        "inception score, standard deviation",
        "standard deviation of inception_score over its splits", "neither", role="detail",
    ),
    "evaluations": _evaluations("evaluations", "network evaluations of one sample"),
    "whole_evaluations": _evaluations(
        "whole evaluations", "those of them in which DeepCache runs the whole network"
    ),
    "shallow_evaluations": _evaluations(
        "shallow evaluations", "those of them in which DeepCache runs the outer blocks alone"
    ),
    "search_evaluations": _evaluations(
        "search evaluations", "network evaluations that the search for a schedule took, once"
    ),
    "images_per_s": MetricInfo(
        "images/s", "samples per second of generation", "higher", narrow="img/s",
        unit="1/s", format=",.0f", role="cost",
    ),
}  # fmt: skip


def name_of(key: str) -> str:
    """A key without its settings in brackets."""
    return key.partition("[")[0]


def settings_of(key: str) -> str:
    """The settings of a key with their brackets and a space before them; else an empty string."""
    _, bracket, rest = key.partition("[")
    return f" {bracket}{rest}" if bracket else ""


def label(key: str) -> str:
    """The name in full, with the key's settings.

    Raises:
        KeyError: the catalogue has no such figure.
    """
    return CATALOGUE[name_of(key)].label + settings_of(key)


def short(key: str) -> str:
    """The name in tables of many columns.

    Raises:
        KeyError: the catalogue has no such figure.
    """
    info = CATALOGUE[name_of(key)]
    return info.short or info.label


def narrow(key: str) -> str:
    """The name in a terminal.

    Raises:
        KeyError: the catalogue has no such figure.
    """
    return CATALOGUE[name_of(key)].narrow or short(key)


def written(key: str, value: float) -> str:
    """A value in the figure's format; three decimals where the catalogue has no such figure."""
    info = CATALOGUE.get(name_of(key))
    return f"{value:{'.3f' if info is None else info.format}}"


def lower_is_better(key: str) -> bool:
    """Whether less of a figure is better."""
    info = CATALOGUE.get(name_of(key))
    return info is not None and info.better == "lower"


def columns(keys: Iterable[str]) -> list[str]:
    """Those of the keys that are main figures, in the catalogue's order."""
    order = {name: i for i, (name, info) in enumerate(CATALOGUE.items()) if info.role == "main"}
    return sorted((k for k in keys if name_of(k) in order), key=lambda k: order[name_of(k)])


def headline(figures: Mapping[str, Any]) -> str | None:
    """The key of the distance that ranks samplers: the lower, the better; None without one."""
    return next((k for k in columns(figures) if lower_is_better(k)), None)


def described() -> dict[str, str]:
    """The summary of every figure by its key, with unit and paper, in alphabetical order."""

    def line(info: MetricInfo) -> str:
        unit = f", in {info.unit}" if info.unit and info.role != "cost" else ""
        return info.summary + unit + (f" (arXiv:{info.paper})" if info.paper else "")

    return {key: line(CATALOGUE[key]) for key in sorted(CATALOGUE)}
