"""A student in fewer bits: which layer gets how many, its folder, and what that costs.

MixDQ, Zhao et al. 2024 (arXiv:2405.17873). The folder is a stock one, with weights that are rounded
and kept in floating point: its pictures are those of few bits, and its speed and size are not. No
stock file says how inputs of layers are rounded, so that is simulated, and measured here.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.console import consume_with_bar
from distill.data.encode import device
from distill.files import write
from distill.publish.card import draft as card_of
from distill.sampling.student_sampler import decode, default_batch, evaluate_student
from eval.protocols.measure import PROTOCOLS, Protocol, protocol
from students.export import folder as folders
from students.generator import Generator
from students.lora import network_of
from students.quantisation.choice import (
    WIDTHS,
    Whole,
    best,
    divided,
    sensitivities,
    sqnr,
    ssim,
)
from students.quantisation.layers import Bits, bake, calibrated, in_bits
from students.quantisation.rounding import WHOLE
from teachers.errors import UserError, plural
from teachers.families.base import Pretrained, quiet
from teachers.storage.files import read_json
from teachers.teacher import Teacher

QUANTISED = "quantised.json"  # in the folder: bits and ranges of every layer, and figures
PROMPTS = 32  # that a student is calibrated on
NOISE = 1000  # the seed of calibration's noise: none of those that figures are averaged over
FULL, WEIGHTS, BOTH = "full precision", "weights", "and inputs"


@dataclass(frozen=True)
class Request:
    """What is asked for.

    bits: The largest mean over weights.
    activations: Bits of every layer's input; 16 leave it as it is.
    keep_share: The share of layers whose inputs stay whole, those that lose most.
    prompts: That the student is calibrated on; empty for its protocol's.
    seeds: Of each figure; 0 for none.
    """

    bits: float = 8
    activations: int = WHOLE
    keep_share: float = 0.01
    prompts: tuple[str, ...] = ()
    seeds: int = 1

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            UserError: naming the option.
        """
        if not min(WIDTHS) <= self.bits <= max(WIDTHS) and self.bits != WHOLE:
            raise UserError(
                f"--bits {self.bits:g}: layers have {WIDTHS[0]} to {WIDTHS[-1]} bits; give a mean "
                f"of those, or {WHOLE} to leave weights as they are"
            )
        if self.activations != WHOLE and not 4 <= self.activations <= 8:
            raise UserError(
                f"--activation-bits {self.activations}: inputs have 4 to 8 bits; give one of "
                f"those, or {WHOLE} to leave inputs as they are"
            )
        if self.bits == self.activations == WHOLE:
            raise UserError("--bits 16: nothing would be rounded; give fewer bits")
        if not 0 <= self.keep_share < 1:
            raise UserError(
                f"--keep-share {self.keep_share:g}: it is no share; give one from 0 to below 1"
            )


@dataclass(frozen=True)
class Quantised:
    """A student that was written.

    bits: Of each layer, by name.
    agreement: Of pictures with those of full precision, on the prompts of calibration: `sqnr` of
        x̂ in dB, `ssim`, and `mse` of pictures in [-1, 1].
    figures: The protocol's, by step count.
    """

    bits: dict[str, Bits]
    mean_bits: float
    agreement: dict[str, dict[str, float]]
    figures: dict[str, dict[str, Any]]


def quantise(source: Path, out: Path, request: Request) -> Quantised:
    """Write a student in fewer bits to `out`, measured.

    Raises:
        UserError: the request is not valid, or there is no such student.
        ExportError: stock diffusers does not make the student's pictures of the folder.
    """
    request.check()
    generator, teacher = folders.load_student(source)
    generator.to(device())
    network = network_of(generator.denoiser)
    assert isinstance(network, Pretrained)
    where = folders.student_folder(source)
    measure = protocol_of(where)
    whole = calibration(generator, teacher, request, measure)
    bits, scores = chosen(whole, request)
    weights = {n: Bits(weights=b.weights) for n, b in bits.items()}
    stages = {FULL: {}, WEIGHTS: weights}
    if request.activations != WHOLE:
        stages[BOTH] = bits
    x = whole.sample()
    pictures = whole.decode(x)
    agreement, figures = dict[str, dict[str, float]](), dict[str, dict[str, Any]]()
    for name, of in stages.items():
        if name != FULL:
            agreement[name] = agreeing(x, pictures, whole.rounded(of), whole)
        if measure is not None and request.seeds:
            with in_bits(whole.layers, of, first_token=name != WEIGHTS):  # a stock file has one
                figures[name] = {str(k): evaluate_student(generator.at(k), teacher, measure,
                                 request.seeds) for k in generator.counts}  # fmt: skip
    total = sum(v.weights for v in whole.layers.values())
    mean = sum(v.weights * bits[n].weights for n, v in whole.layers.items()) / total
    made = Quantised(bits, mean, agreement, figures)
    bake(whole.layers, weights)
    about = {
        "bits": {n: asdict(b) for n, b in bits.items()}, "mean_bits": mean,
        "ranges": {n: v.ranges for n, v in whole.layers.items()},
        "splits": {n: v.split for n, v in whole.layers.items() if v.split},
        "first_token": [n for n, v in whole.layers.items() if v.first is not None],
        "scores": scores, "agreement": agreement, "metrics": figures,
    }  # fmt: skip
    save(where, out, generator, teacher, about | {"line": line_of(made, request)})
    return made


def protocol_of(where: Path) -> Protocol | None:
    """The protocol that a student's own run was measured by."""
    recipe = read_json(where / folders.SIDECAR, f"student {str(where)!r}").get("recipe")
    name = (recipe.get("eval") or {}).get("protocol") if isinstance(recipe, dict) else None
    return protocol(name) if name in PROTOCOLS else None


def calibration(
    generator: Generator, teacher: Teacher, request: Request, measure: Protocol | None
) -> Whole:
    """The student at its own times, of the prompts that it is calibrated on."""
    prompts: Sequence[Any] = request.prompts or folders.prompts_of(teacher)
    if not request.prompts and measure is not None:
        prompts = measure.prompts[:: max(1, len(measure.prompts) // PROMPTS)]
    prompts = [prompts[i % len(prompts)] for i in range(PROMPTS)]
    network: Any = network_of(generator.denoiser)
    most = generator.at(max(generator.counts))
    sample = partial(folders.sample_student, most, teacher, prompts, NOISE,
                     default_batch(teacher), teacher.codec.condition(prompts))  # fmt: skip

    def pictures(x: Tensor) -> Tensor:
        return decode(teacher, x, default_batch(teacher)).float()

    return Whole(network.backbone, calibrated(network.backbone, sample), sample, pictures)


def chosen(whole: Whole, request: Request) -> tuple[dict[str, Bits], dict[str, Any]]:
    """The bits of each layer, and what was measured to choose them."""
    mixed = request.bits < max(WIDTHS)
    widths = WIDTHS if mixed else ()
    inputs = request.activations if request.activations != WHOLE else None
    kept, ratios = dict[str, dict[int, float]](), dict[str, float]()

    def run() -> Any:
        for i, (name, of, ratio) in enumerate(sensitivities(whole, widths, inputs)):
            kept[name] = of
            if ratio is not None:
                ratios[name] = ratio
            yield i + 1

    if mixed or inputs:
        consume_with_bar(run(), len(whole.layers), "measuring what each layer loses by its bits")
    weights = dict.fromkeys(whole.layers, int(request.bits))
    if mixed:
        weights = best(whole, divided(kept, whole.layers, request.bits))
    stay = sorted(ratios, key=ratios.__getitem__)[: ceil(request.keep_share * len(ratios))]
    bits = {n: Bits(b, WHOLE if n in stay else request.activations) for n, b in weights.items()}
    return bits, {"weights": kept, "inputs": ratios}


def agreeing(x: Tensor, pictures: Tensor, made: Tensor, whole: Whole) -> dict[str, float]:
    """How near samples and their pictures are to those of full precision."""
    shown = whole.decode(made)
    error = (shown - pictures).square().mean().item()
    return {"sqnr": sqnr(x, made), "ssim": ssim(pictures, shown), "mse": error}


def save(
    where: Path, out: Path, generator: Generator, teacher: Teacher, about: dict[str, Any]
) -> None:
    """Write a copy of a student's folder with the weights that the generator has now.

    Raises:
        ExportError: stock diffusers does not make the student's pictures of it.
    """
    network: Any = network_of(generator.denoiser)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        made, fresh = Path(scratch) / "folder", Path(scratch) / "weights"
        shutil.copytree(where, made, ignore=shutil.ignore_patterns("README.md"))
        with quiet():
            network.backbone.save_pretrained(fresh)
        for old in (made / network.PART).glob("*.safetensors*"):
            old.unlink()
        for new in fresh.glob("*.safetensors*"):
            shutil.move(new, made / network.PART / new.name)
        sidecar = read_json(made / folders.SIDECAR, f"student {str(where)!r}")
        sidecar["rounded"] = about["line"]
        write(made / folders.SIDECAR, json.dumps(sidecar, indent=2) + "\n")
        write(made / QUANTISED, json.dumps(about, indent=2) + "\n")
        folders.verify(made, generator, teacher)
        summary = where.parent / "summary.json"
        known = read_json(summary, str(where)) if summary.is_file() else {}
        rows = {**known, "metrics": {"student": about["metrics"].get(WEIGHTS, {})}} if known else {}
        write(made / "README.md", card_of(made, rows))
        os.replace(made, out)


def line_of(made: Quantised, request: Request) -> str:
    """What the weights are, for the card."""
    inputs = ""
    if request.activations != WHOLE:
        inputs = f"; inputs of layers in {request.activations} bits are not in these files"
    return (
        f"rounded to {made.mean_bits:.3g} bits in the mean and kept in floating point, by the "
        f"choice of MixDQ (arXiv:2405.17873){inputs}"
    )


def rows_of(made: Quantised) -> dict[str, dict[str, Any]]:
    """The figures of a table, by what is rounded and, of several, the step count."""
    return {
        name if len(rows) == 1 else f"{name}, {k}": {"evaluations": float(k), **row}
        for name, rows in made.figures.items()
        for k, row in rows.items()
    }


def summary(made: Quantised, out: Path) -> str:
    """What was made, in a few lines."""
    counts = sorted(Counter(b.weights for b in made.bits.values()).items())
    widths = ", ".join(f"{n} {plural(n, 'layer')} of {b} bits" for b, n in counts)
    lines = [f"weights: {widths}; {made.mean_bits:.3g} in the mean"]
    for name, v in made.agreement.items():
        lines.append(f"{name}: SSIM {v['ssim']:.4f} with full precision, SQNR {v['sqnr']:.1f} dB")
    return "\n".join([*lines, f"student in {out}"])
