"""The teacher of a recipe's `teacher` section: loaded, and guided."""

from __future__ import annotations

from functools import lru_cache

from distill.config.schema import GuidanceSection, TeacherSection
from distill.data.encode import counting, tell
from teachers.catalogue.loading import load
from teachers.denoiser import Denoiser, Guided, Mix, Reparametrised, linear
from teachers.errors import UserError
from teachers.guidance import AutoGuided, Interval, Projected, Rescaled, SkipLayerGuided
from teachers.teacher import Teacher


def load_teacher(section: TeacherSection) -> Teacher:
    """The teacher, unguided.

    Raises:
        UserError: it cannot be loaded, or guidance needs a null class that it does not have.
    """
    teacher = load(section.source, **section.options())
    how = guidance_of(section)
    if section.negative_prompt:
        with counting(teacher) as cuts:
            _ = teacher.codec.null  # encoded at its first use, which is this
        tell(cuts, "teacher.negative_prompt")
    if how.kind in ("cfg", "apg") and how.scale != 1 and teacher.codec.null is None:
        raise UserError(
            f"teacher.guidance: {how.scale} needs a null class, and "
            f"{section.source!r} names none; set teacher.null_label, or guidance to 1"
        )
    return teacher


def guidance_of(section: TeacherSection) -> GuidanceSection:
    """The teacher's guidance with all its keys: a number alone is classifier-free guidance."""
    how = section.guidance
    return how if isinstance(how, GuidanceSection) else GuidanceSection(scale=how)


def guided(section: TeacherSection, teacher: Teacher) -> Denoiser:
    """What the objective sees as its teacher; scale 1 passes straight through.

    Raises:
        UserError: a block that is to be skipped is not there, or the weaker teacher does not fit.
    """
    how, denoiser = guidance_of(section), teacher.denoiser
    mix: Mix = linear
    if how.kind == "apg":
        mix = Projected(how.eta or 0.0, how.threshold)
    if how.rescale:
        mix = Rescaled(how.rescale, mix)
    if how.kind == "skip":
        found: Guided = SkipLayerGuided(denoiser, how.scale, how.blocks, mix)
    elif how.weaker is not None:
        found = AutoGuided(
            denoiser, how.scale, weaker(how.weaker, section.null_label, teacher), mix
        )
    else:
        found = Guided(denoiser, how.scale, teacher.codec.null, mix)
    return found if how.interval is None else Interval(found, *how.interval)


def weaker(source: str, null_label: int | None, teacher: Teacher) -> Denoiser:
    """Autoguidance's weaker network, under the teacher's process and on its device."""
    other = read_once(source, null_label)
    if other.shape != teacher.shape:
        want, got = ("×".join(map(str, s)) for s in (teacher.shape, other.shape))
        raise UserError(f"teacher.guidance.weaker: {source!r} is {got}; the teacher is {want}")
    check_reads(source, other, teacher)
    parameters = [*teacher.denoiser.parameters(), *teacher.denoiser.buffers()]
    denoiser = other.denoiser.to(parameters[0].device)
    same = denoiser.process == teacher.denoiser.process
    return denoiser if same else Reparametrised(denoiser, teacher.denoiser.process)


def check_reads(source: str, other: Teacher, teacher: Teacher) -> None:
    """Refuse a weaker teacher that could not read the conditions that the teacher is given."""
    given, read = ({k: tuple(v.shape[1:]) for k, v in (t.codec.condition([0]) or {}).items()}
                   for t in (teacher, other))  # fmt: skip
    classes = [getattr(t.codec, "classes", 0) for t in (teacher, other)]
    if given == read and classes[0] == classes[1]:
        return
    want, got = (shown(c, n) for c, n in zip((given, read), classes, strict=True))
    raise UserError(
        f"teacher.guidance.weaker: {source!r} reads {got}; the teacher is given {want}: name a "
        "smaller or less trained one of its family"
    )


def shown(entries: dict[str, tuple[int, ...]], classes: int) -> str:
    """Conditions in a few words: their entries and sizes, or how many labels there are."""
    if classes:
        return f"labels of {classes} classes"
    sizes = [f"{k} of {'×'.join(map(str, v)) or 'one number'}" for k, v in entries.items()]
    return ", ".join(sizes) or "no condition"


@lru_cache(maxsize=1)
def read_once(source: str, null_label: int | None) -> Teacher:
    """A weaker teacher: asked for at each evaluation, read once."""
    return load(source, **({} if null_label is None else {"null_label": null_label}))
