"""The teacher of a recipe, loaded and guided."""

from __future__ import annotations

from functools import lru_cache

from distill.config.schema import GuidanceSection, SharedTimesSection, TeacherSection
from distill.data.encode import counting, print_cuts
from distill.sampling import discriminator
from students.lora import innermost, unwrap
from students.scale_reading import GuidedStudent
from teachers.catalogue.loading import load, pictures_of
from teachers.denoiser import Denoiser, Guided, Mix, Network, Reparametrised, linear
from teachers.errors import UserError
from teachers.families.unet import UNet
from teachers.guidance import (
    AutoGuided,
    FirstChannels,
    Interval,
    Projected,
    Rescaled,
    SkipLayerGuided,
)
from teachers.teacher import Teacher


def load_teacher(section: TeacherSection) -> Teacher:
    """The teacher of a recipe, unguided."""
    teacher = load(section.source, **section.options())
    if section.share_times is not None:
        share_times(teacher.denoiser, section.share_times, "teacher")
    if section.discriminator is not None:  # before adapters change the teacher's layers
        discriminator.check(section.discriminator, teacher)
    guidance = guidance_of(section)
    if section.negative_prompt:
        with counting(teacher) as cuts:
            _ = teacher.codec.null  # the codec encodes it at its first use, which is here
        print_cuts(cuts, "teacher.negative_prompt")
    if guidance.kind in ("cfg", "apg") and guidance.scale != 1 and teacher.codec.null is None:
        raise UserError(
            f"teacher.guidance: {guidance.scale} needs a null class, and "
            f"{section.source!r} has none; set teacher.null_label, or guidance to 1"
        )
    return teacher


def share_times(denoiser: Denoiser, section: SharedTimesSection, key: str) -> None:
    """Have the network of a teacher or a student read some times as one, in place.

    Args:
        key: The section that has the key `share_times`.

    Raises:
        UserError: it is a closed form, which has no network.
    """
    network = innermost(denoiser)
    if not isinstance(network, Network):
        raise UserError(f"{key}.share_times: a closed form has no network to read them; remove it")
    network.share_times = section.shared


def known_pictures(section: TeacherSection) -> str | None:
    """The picture that the teacher takes with each prompt, as far as can be known unloaded."""
    return pictures_of(section.source)


def guidance_of(section: TeacherSection) -> GuidanceSection:
    """The guidance as a section; a plain number is classifier-free guidance."""
    guidance = section.guidance
    return guidance if isinstance(guidance, GuidanceSection) else GuidanceSection(scale=guidance)


def guided(section: TeacherSection, teacher: Teacher) -> Denoiser:
    """The denoiser that the objective takes as its teacher: guided, then with its discriminator.

    Guidance of scale 1 changes nothing.

    Raises:
        UserError: a block to skip does not exist, or the weaker teacher does not fit.
    """
    if section.discriminator is not None:
        alone = section.model_copy(update={"discriminator": None})
        return discriminator.with_discriminator(
            section.discriminator, teacher, guided(alone, teacher)
        )
    guidance, denoiser = guidance_of(section), teacher.denoiser
    scale = guidance.one_scale
    mix: Mix = linear
    if guidance.kind == "apg":
        mix = Projected(guidance.eta or 0.0, guidance.threshold)
    if guidance.rescale:
        mix = Rescaled(guidance.rescale, mix)
    if guidance.channels is not None:
        if guidance.channels > teacher.shape[0]:
            raise UserError(
                f"teacher.guidance.channels: {guidance.channels} is more than the teacher's "
                f"{teacher.shape[0]}; give fewer"
            )
        mix = FirstChannels(guidance.channels, mix)
    if guidance.kind == "skip":
        result: Guided = SkipLayerGuided(denoiser, scale, guidance.blocks, mix)
    elif guidance.weaker is not None:
        result = AutoGuided(
            denoiser, scale, weaker_denoiser(guidance.weaker, section.null_label, teacher), mix
        )
    else:
        result = Guided(denoiser, scale, teacher.codec.null, mix)
    return result if guidance.interval is None else Interval(result, *guidance.interval)


def guided_student(section: TeacherSection, teacher: Teacher, student: Denoiser) -> Denoiser:
    """A student that its stock pipeline guides, with the teacher's scale.

    Raises:
        UserError: the pipeline does not guide, or not as this teacher is guided.
    """
    guidance = guidance_of(section)
    given = guidance.model_dump(exclude_defaults=True).keys()
    if given - {"scale", "sampling_scale"}:
        raise UserError(
            "teacher.guidance: the student's pipeline guides by classifier-free guidance alone; "
            "leave the other keys out, or choose an objective whose student is not guided"
        )
    if isinstance(unwrap(student), UNet):  # networks of pixels, in ConsistencyModelPipeline
        raise UserError(
            "objective.name: this teacher's stock pipeline guides no student; choose progressive, "
            "or set teacher.guidance to 1"
        )
    return GuidedStudent(student, guidance.one_scale, teacher.codec.null)


def weaker_denoiser(source: str, null_label: int | None, teacher: Teacher) -> Denoiser:
    """The weaker network of autoguidance, under the teacher's process and on its device."""
    other = load_cached(source, null_label)
    if other.shape != teacher.shape:
        want, got = ("×".join(map(str, s)) for s in (teacher.shape, other.shape))
        raise UserError(f"teacher.guidance.weaker: {source!r} is {got}; give one of {want}")
    check_conditions(source, other, teacher)
    parameters = [*teacher.denoiser.parameters(), *teacher.denoiser.buffers()]
    denoiser = other.denoiser.to(parameters[0].device)
    same = denoiser.process == teacher.denoiser.process
    return denoiser if same else Reparametrised(denoiser, teacher.denoiser.process)


def check_conditions(source: str, other: Teacher, teacher: Teacher) -> None:
    """Refuse a weaker teacher whose conditions differ from the teacher's."""
    wanted, actual = ({k: tuple(v.shape[1:]) for k, v in (t.codec.condition([0]) or {}).items()}
                   for t in (teacher, other))  # fmt: skip
    classes = [t.codec.classes for t in (teacher, other)]
    if wanted == actual and classes[0] == classes[1]:
        return
    want, got = (described(c, n) for c, n in zip((wanted, actual), classes, strict=True))
    raise UserError(
        f"teacher.guidance.weaker: {source!r} reads {got}; the teacher reads {want}; name a "
        "smaller or less trained model of the same family"
    )


def described(entries: dict[str, tuple[int, ...]], classes: int) -> str:
    """Conditions in a few words: the number of labels, or the entries with their sizes."""
    if classes:
        return f"labels of {classes} classes"
    sizes = [f"{k} of {'×'.join(map(str, v)) or 'one number'}" for k, v in entries.items()]
    return ", ".join(sizes) or "no condition"


@lru_cache(maxsize=1)
def load_cached(source: str, null_label: int | None) -> Teacher:
    """A weaker teacher, read once although every evaluation needs it."""
    return load(source, **({} if null_label is None else {"null_label": null_label}))
