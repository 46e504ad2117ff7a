"""A discriminator's file: the heads of a critic of the teacher's samples, and what they belong to.

`save` writes it, `check` refuses one of another teacher before any work, and `with_discriminator`
puts it around a teacher (`teachers/guidance.py: DiscriminatorGuided`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import unset_fake_temporarily

from distill.config.schema import DiscriminatorSection
from distill.sampling.identity import levels, weights_hash
from students.critic import Critic
from teachers.denoiser import Denoiser
from teachers.errors import UserError, clipped
from teachers.features import blocks_of
from teachers.guidance import DiscriminatorGuided
from teachers.storage.files import home, save_whole
from teachers.teacher import Teacher

NAME = "critic.safetensors"  # in the folder of the run that trained it
KEY = "teacher.discriminator.file"  # the recipe key, which begins error messages
ABOUT, FORMAT = "discriminator", 1  # the key of the file's metadata, and their version
REMEDY = "give the critic.safetensors that distill teach left of the objective discriminator"


def save(critic: Critic, teacher: Teacher, path: Path, **settings: Any) -> None:
    """Write a critic's heads, with the teacher that they read and how they were trained.

    Args:
        teacher: Unguided.
        settings: Plain data; `interval` is the range of σ/α that they were trained at.

    Raises:
        SafetensorError, OSError: it cannot be written; nothing is left of it.
    """
    about = {"format": FORMAT, "blocks": list(critic.blocks), **identity(teacher), **settings}
    tensors = {k: v.detach().cpu() for k, v in critic.state_dict().items()}
    save_whole(tensors, path, {ABOUT: json.dumps(about)})


def identity(teacher: Teacher) -> dict[str, Any]:
    """What the teacher of a discriminator is known by."""
    return {
        "teacher": teacher.source,
        "weights": weights_hash(teacher.denoiser),
        "levels": levels(teacher),
        "shape": list(teacher.shape),
    }


def read_about(file: str) -> tuple[Path, dict[str, Any]]:
    """A discriminator's file, and what it says of itself.

    Raises:
        UserError: it is missing, or no discriminator.
    """
    path, shown = home(file, KEY), clipped(file)
    if not path.is_file():
        fault = "it is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"{KEY}: {shown}: {fault}; {REMEDY}")
    try:
        with safe_open(path, framework="pt") as opened:
            text = (opened.metadata() or {}).get(ABOUT)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{KEY}: {shown}: it cannot be read ({error}); {REMEDY}") from None
    try:
        about = json.loads(text or "")
        low, high = map(float, about["interval"])
        sound = about["format"] == FORMAT and low < high
        sound = sound and all(isinstance(name, str) for name in about["blocks"])
    except (ValueError, KeyError, TypeError):
        sound, about = False, {}
    if not sound:
        raise UserError(f"{KEY}: {shown}: it does not say what it was trained on; {REMEDY}")
    return path, about


def check(section: DiscriminatorSection, teacher: Teacher) -> None:
    """Refuse a discriminator that does not belong to a teacher as it was loaded.

    Raises:
        UserError: it was trained on another teacher or at other noise levels, or its heads do not
            fit.
    """
    _, about = read_about(section.file)
    (low, high), asked = about["interval"], section.interval
    if asked is not None and not low <= asked[0] < asked[1] <= high:
        raise UserError(
            f"teacher.discriminator.interval: {clipped(section.file)} was trained where "
            f"{low:g} ≤ σ/α ≤ {high:g}, and {list(asked)} goes beyond; stay within, or "
            "remove it"
        )
    for name, value in identity(teacher).items():
        if name != "teacher" and about.get(name) != value:
            raise UserError(
                f"{KEY}: {clipped(section.file)}: it was trained on the teacher "
                f"{clipped(str(about.get('teacher')))!r} with other {name}; name that teacher, in "
                "its precision, or train a discriminator of this one"
            )
    critic_of(section, teacher)


def critic_of(section: DiscriminatorSection, teacher: Teacher) -> Critic:
    """The discriminator, frozen, on the teacher's features and on its device.

    Raises:
        UserError: the teacher has no such blocks, or the file has not these heads.
    """
    with unset_fake_temporarily():  # in a plan too, the file is read
        path, about = read_about(section.file)
        weights = load_file(path)
    blocks_of(teacher.denoiser, about["blocks"], KEY)
    critic = Critic(teacher.denoiser, teacher.shape, teacher.codec.condition([0]), about["blocks"])
    try:
        critic.load_state_dict(weights)
    except RuntimeError:
        raise UserError(
            f"{KEY}: {clipped(section.file)}: its heads do not fit the blocks "
            f"{', '.join(about['blocks'])} that it names; {REMEDY}"
        ) from None
    return critic.requires_grad_(False).eval()


def with_discriminator(
    section: DiscriminatorSection, teacher: Teacher, denoiser: Denoiser
) -> Denoiser:
    """The guided teacher, moved by its discriminator.

    Args:
        teacher: Unguided; its features are read.
        denoiser: The same, guided or not.

    Raises:
        UserError: as `critic_of`.
    """
    low, high = section.interval or read_about(section.file)[1]["interval"]
    critic = critic_of(section, teacher)
    return DiscriminatorGuided(denoiser, critic, section.scale, (low, high), section.boost)


def described(section: DiscriminatorSection | None) -> dict[str, Any] | None:
    """Plain data on which the teacher's samples depend; None where there is no discriminator."""
    if section is None:
        return None
    path, _ = read_about(section.file)
    content = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    return {**section.model_dump(mode="json"), "file": content}
