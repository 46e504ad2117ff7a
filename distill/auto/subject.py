"""What `distill auto` knows of the model: its teacher, its family, its size, its LoRA files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.data.from_recipe import examples
from distill.planning.doctor import diagnose, has_pictures, pictures_for, verdict
from distill.rates import family_of
from students.lora import network_of, unwrap
from students.own_network import example_condition, is_own, middle_of
from teachers.adapters.files import check, read
from teachers.catalogue.loading import load
from teachers.catalogue.outlines import OUTLINES, outline
from teachers.errors import UserError
from teachers.process import Karras, Linear
from teachers.quantised import parameters
from teachers.storage.files import home
from teachers.storage.plugin import is_function
from teachers.teacher import EMBEDDED, Teacher

OWN = "own"  # the family of a network of the user's own, which has no recipes
FOLDERS = {"adm": "edm"}  # of recipes, by the family of a network where the names differ
ENCODERS = ("lora_te", "text_encoder", "text_model")  # in the keys of a LoRA's text-encoder part
KEY = re.compile(r"teacher\.adapters(\.\d+(\.\w+)?)?: (?P<reason>.+)", re.DOTALL)  # of messages
SMALL = 20e6  # parameters, below which the embedded teachers' settings fit better than large ones'


@dataclass(frozen=True)
class Subject:
    """The model to distil.

    Args:
        weights: Whether its weights are here; else its shapes alone are known.
        family: The folder of its family's recipes.
        kind: What its samples are asked for by: "text", "labels" or "none".
        parameters: Of its network.
        adapters: LoRA files that become part of it, as a recipe has them.
    """

    source: str
    teacher: Teacher
    weights: bool
    family: str
    kind: str
    parameters: int
    adapters: tuple[dict[str, Any], ...] = ()

    @property
    def small(self) -> bool:
        return self.parameters < SMALL

    @property
    def unguided(self) -> bool:
        """Whether nothing conditions it, or a network of the user's own has no null condition."""
        return self.kind == "none" or (self.family == OWN and self.teacher.codec.null is None)

    @property
    def quantisable(self) -> bool:
        """Whether its frozen weights may be of lower precision."""
        return self.family not in ("adm", "edm", OWN)

    @property
    def flows(self) -> bool:
        """Whether its process is a rectified flow."""
        return isinstance(self.teacher.denoiser.process, Linear)

    @property
    def chooses_start(self) -> bool:
        """Whether its students choose the noise level that they start at, as those of EDM do."""
        return self.family != OWN and isinstance(self.teacher.denoiser.process, Karras)

    @property
    def takes_critic(self) -> bool:
        """Whether it is known which block a critic reads."""
        if self.family != OWN:
            return True
        try:
            return bool(middle_of(network_of(self.teacher.denoiser)))
        except UserError:
            return False


def subject_of(source: str, adapters: Sequence[dict[str, Any]] = ()) -> Subject:
    """The model at `source`, with these LoRA files in it.

    Raises:
        UserError: it cannot be loaded, or a LoRA file does not fit it.
    """
    weights = source not in OUTLINES or home(source, "MODEL").exists()
    if weights:
        options = {"adapters": list(adapters)} if adapters else {}
        with named_as_option():
            teacher = load(source, **options)
    else:
        teacher = outline(source, torch.device("meta"), precision="bf16")
        with named_as_option():
            fit(teacher, adapters)
    if teacher.codec.pictures:
        raise UserError(
            f"MODEL: {source!r} takes a picture with each prompt, and auto knows no such data; "
            "start from a recipe of its family: distill list recipes"
        )
    network: Any = network_of(teacher.denoiser)
    family = OWN if is_own(teacher.denoiser) else family_of(network)
    return Subject(
        source, teacher, weights, FOLDERS.get(family, family), kind_of(teacher),
        parameters(network.backbone), tuple(adapters),
    )  # fmt: skip


@contextmanager
def named_as_option() -> Iterator[None]:
    """Within it, errors about the recipe's key of LoRA files name the option of the command."""
    try:
        yield
    except UserError as error:
        if (match := KEY.fullmatch(str(error))) is None:
            raise
        raise UserError(f"--lora: {match['reason']}") from None


def kind_of(teacher: Teacher) -> str:
    """What its samples are asked for by."""
    if teacher.codec.classes:
        return "labels"
    own = is_own(teacher.denoiser)
    cond = example_condition(teacher, 1) if own else teacher.codec.condition([""])
    return "none" if cond is None else "text"


def fit(teacher: Teacher, adapters: Sequence[dict[str, Any]]) -> None:
    """Fit LoRA files to a network without values.

    Raises:
        UserError: one does not fit.
    """
    network: Any = unwrap(teacher.denoiser)
    parts: dict[str, nn.Module] = {network.PART: network.backbone}
    for key, path, strength in check(adapters):
        try:
            read(path, key, strength, network.PART, parts)
        except UserError as error:
            if not any(name in str(error) for name in ENCODERS):
                raise
            raise UserError(
                f"--lora {path.name}: it changes text encoders, and these are not on this machine "
                "to be checked; download the model, and give its folder"
            ) from None


def examine(subject: Subject, images: Path | None = None) -> tuple[str, str]:
    """The doctor's verdict on a teacher whose weights are here, and what it doubts.

    Args:
        images: The user's own; without them a failed check may be the synthetic pictures' fault, so
            it is a doubt and no error.

    Raises:
        UserError: a check failed on embedded or own data.
    """
    teacher, prompts = subject.teacher, None
    synthetic = images is None and subject.source not in EMBEDDED
    if subject.source in EMBEDDED:
        pictures, prompts = examples(subject.source)
    else:
        pictures = pictures_for(teacher, images)
    structure = images is None and not has_pictures(teacher)
    checks = diagnose(teacher, pictures, prompts, structure)
    failed = [c for c in checks if c.verdict in ("broken", "untrained?")]
    if failed and not synthetic:
        raise UserError(f"doctor {subject.source!r}: {failed[0].remedy}")
    doubt = ""
    if failed:
        remedy = failed[0].remedy.replace("give --image", "give distill doctor --image")
        doubt = f"The doctor doubts it, on synthetic pictures: {remedy}."
    return verdict(checks), doubt


def pictures_in(data: Mapping[str, Any]) -> Path | None:
    """The folder of images in a recipe's section of data, or the function that makes data."""
    place = data.get("source")
    if isinstance(place, str) and is_function(place):
        return Path(place)
    folder = None if not isinstance(place, str) else Path(place).expanduser()
    return folder if folder is not None and folder.is_dir() else None
