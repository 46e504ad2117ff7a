"""The networks of an objective: teacher, student, critic, and the others that its fields name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from distill.config.objective_schema import network_types, networks_of
from distill.config.recipe import Recipe
from distill.config.schema import AdaptersSection, CriticSection
from distill.objectives.base import Auxiliary, Objective
from distill.objectives.distribution.anchored import AnchoredDMD2
from distill.sampling.guided_teacher import guidance_of, guided, guided_student, share_times
from students.architecture.change import changed_teacher
from students.checkpointing import checkpointing
from students.critic import Critic, HeldWeights, ImageFeatures, SANCritic
from students.export import earlier
from students.export.forms import form_of
from students.form import StudentForm, StudentRequest
from students.generator import Generator
from students.lora import AdaptedDenoiser, Adapter, adapt, network_of
from students.own_network import middle_of
from students.quantisation.training import rounding
from students.scale_reading import scale_reading
from students.schedulers import renoised_in_part
from students.two_time import keep_slow, two_time
from teachers.denoiser import Denoiser, Network
from teachers.errors import UserError, clipped, first_line
from teachers.families.base import Pretrained
from teachers.storage.plugin import called
from teachers.teacher import Teacher

ENCODER = "critic.encoder"  # the recipe key


def objective_of(recipe: Recipe, teacher: Teacher, device: torch.device) -> Objective:
    """The recipe's objective with its networks on the device, in eval mode.

    Raises:
        UserError: the recipe asks for networks that there cannot be.
    """
    check_form(recipe, form_for(recipe, teacher))
    objective = assembled(recipe, build_networks(recipe, teacher), device)
    if recipe.student.init is not None and isinstance(objective, AnchoredDMD2):
        # not the student as it starts, whose base may have LoRA files that it did not have
        objective.before = earlier.denoiser(recipe.student.init).to(device)
    return objective


def form_for(recipe: Recipe, teacher: Teacher) -> StudentForm:
    """The form of a recipe's students."""
    return form_of(teacher, recipe.kind.few_step, recipe.student.network)


def build_networks(
    recipe: Recipe, teacher: Teacher, form: StudentForm | None = None
) -> dict[str, nn.Module]:
    """The networks that the objective's fields name, by field.

    Args:
        form: The form of the teacher's students; by default the one that it has. With one, no
            weights of an earlier student are read: it is a plan's, of networks without values.

    Raises:
        UserError: the teacher, the student, the adapters or the critic do not go together.
    """
    planned = form is not None
    form = form or form_for(recipe, teacher)
    names = [n for n in network_types(recipe.kind, Denoiser) if n != "teacher"]
    adapters = shared_weights(recipe.adapters, names) if form.adapts else {}
    # copies first: a copy that is made after the adapters would contain them
    networks: dict[str, nn.Module] = {n: form.network() for n in names if n not in adapters}
    if recipe.kind.trains == "student":
        student = student_of(recipe, form, adapters.get("student"), planned)
        networks["student"] = with_numbers(recipe, with_guidance(recipe, teacher, student))
    else:
        networks["student"] = Generator(teacher.denoiser)
    for name in [n for n in names if n in adapters]:
        networks[name] = adapt(teacher, adapters[name], name)
    networks["teacher"] = guided(recipe.teacher, teacher)
    if recipe.critic is not None:
        kind = network_types(recipe.kind, Critic)["critic"]
        networks["critic"] = critic_of(recipe.critic, networks, teacher, kind)
    auxiliaries: dict[str, type[Any]] = network_types(recipe.kind, Auxiliary)
    for name, auxiliary in auxiliaries.items():
        networks[name] = auxiliary.for_objective(teacher).requires_grad_(True)
    if recipe.train.checkpointing:
        for backbone in backbones(networks):
            checkpointing(backbone)
    return networks


def with_numbers(recipe: Recipe, student: Generator) -> Generator:
    """The student, in place, as it reads times in this objective: where its steps land, and slowly
    varying where derivatives along time are taken.

    Raises:
        UserError: its network names no time embedding that landing times could be added to.
    """
    if recipe.kind.two_times:
        student = two_time(student, recipe.student.landing == "mixed")
    if recipe.kind.two_times or recipe.kind.differentiates_time:
        keep_slow(student.denoiser)
    return student


def student_of(
    recipe: Recipe, form: StudentForm, adapter: Adapter | None, planned: bool
) -> Generator:
    """The student before training, as the teacher or as an earlier student, with its step counts.

    Args:
        planned: Read no weights of an earlier student.

    Raises:
        UserError: there is no such student.
    """
    s = recipe.student
    if s.init is None or planned:
        student = shaped(recipe, form).student(s.steps, s.start, s.renoise, adapter)
    else:
        student = earlier.student(s.init, form, s.steps, s.renoise, adapter)
    if s.share_times is not None:
        share_times(student.denoiser, s.share_times, "student")
    if s.gamma is not None:
        student = renoised_in_part(student, s.gamma)
    if s.format is not None:
        student = rounding(student, s.format.weights)
    counts = s.trained(recipe.kind.learns, student.counts)
    return student.keep(*counts, weights=list(counts.values()))


def shaped(recipe: Recipe, form: StudentForm) -> StudentForm:
    """The form of students that have the recipe's architecture.

    Raises:
        UserError: the teacher's weights do not make such a network.
    """
    s, teacher = recipe.student, form.teacher
    if s.architecture is not None and s.network is None:
        made = changed_teacher(teacher, **s.architecture.model_dump(exclude={"network"}))
        return replace(form, teacher=made)
    if s.init is not None and (backbone := earlier.outline(s.init, teacher)) is not None:
        network = network_of(teacher.denoiser)
        assert isinstance(network, Pretrained)
        twin = network.twin(backbone, network.schedule)
        return replace(form, teacher=replace(teacher, denoiser=twin))
    return form


def with_guidance(recipe: Recipe, teacher: Teacher, student: Generator) -> Generator:
    """The student, in place, that is guided or reads a guidance scale where its recipe says so.

    Raises:
        UserError: its stock pipeline does not guide it so, or its network cannot read a scale.
    """
    guidance = guidance_of(recipe.teacher)
    if recipe.kind.mixes_student and guidance.scale != 1:
        student.denoiser = guided_student(recipe.teacher, teacher, student.denoiser)
    elif guidance.range is not None:
        scale_reading(student, guidance.range, guidance.one_scale)
    return student


def shared_weights(section: AdaptersSection | None, names: Sequence[str]) -> dict[str, Adapter]:
    """The adapter of each network that is one on the teacher's weights, and not a copy of them.

    Args:
        names: The objective's denoisers beside teacher and student.
    """
    if section is None:
        return {}
    shared = ("student", *names) if section.players is None else section.players
    return dict.fromkeys(shared, section.adapter)


def critic_of(
    section: CriticSection, networks: Mapping[str, Any], teacher: Teacher, kind: type[Any] = Critic
) -> Critic:
    """A critic that reads the features of a network of the run, or of a network of images.

    Args:
        networks: The student, and the fake score where the objective has one: without `reads` the
            critic reads its features, else the teacher's.
        kind: The objective's kind of critic.

    Raises:
        UserError: it has no such blocks.
    """
    source = section.reads or ("fake" if "fake" in networks else "teacher")
    if source == "student":
        network: Any = HeldWeights(networks["student"].denoiser)
    else:
        network = teacher.denoiser if source == "teacher" else networks["fake"]
    if section.encoder is not None:
        source, network = section.encoder, image_features(section.encoder, teacher)
        blocks = section.blocks or ("encoder",)
    elif section.blocks is None:
        blocks = (middle_of(network_of(network)),)
    else:
        blocks = section.blocks
    if section.san:
        kind = SANCritic
    critic = kind(network, teacher.shape, teacher.codec.condition([0]), blocks)
    critic.source = source
    return critic


def image_features(place: str, teacher: Teacher) -> ImageFeatures:
    """What a critic reads of the network that a function in a user's file returns.

    Raises:
        UserError: there is no such function, it raises an exception, or returns something else; or
            the network cannot read the teacher's images.
    """
    with unset_fake_temporarily():  # in a plan too, weights are read from files
        encoder = called(place, ENCODER)
    if not isinstance(encoder, nn.Module):
        raise UserError(
            f"{ENCODER}: {place!r} returned a {type(encoder).__name__}; return a torch module"
        )
    features = ImageFeatures(encoder, teacher.codec, teacher.denoiser.process)
    x = torch.zeros(1, *teacher.shape)
    try:
        with torch.no_grad():
            features(x, x.new_zeros(1))
    except (Exception, SystemExit) as error:  # a user's network may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{ENCODER}: of an image of this teacher it raised {clipped(reason, 200)}; return a "
            "network of such images"
        ) from None
    return features


def check_form(recipe: Recipe, form: StudentForm) -> None:
    """Refuse a recipe that asks of the teacher's students what they cannot be.

    Raises:
        UserError: naming the key.
    """
    form.check(
        StudentRequest(
            objective=recipe.objective["name"],
            networks=networks_of(recipe.kind),
            sections=[k for k in ("adapters", "critic") if getattr(recipe, k) is not None],
            steps=recipe.student.steps,
            sample_every=recipe.train.sample_every,
        )
    )


def path_of(recipe: Recipe, x: Tensor) -> Tensor | None:
    """States of x (B, ...) as the recipe's pairs have them (B, T, ...); zeros, for plans."""
    states = recipe.data.states
    return x.new_zeros(len(x), states, *x.shape[1:]) if states else None


def assembled(recipe: Recipe, networks: dict[str, nn.Module], device: torch.device) -> Objective:
    """The recipe's objective with its networks, all on the device and in eval mode."""
    for network in networks.values():
        network.to(device).eval()  # dropout would differ between teacher, fake and student
    for backbone in backbones(networks):
        backbone.to(device)  # adapters do not hold theirs
    keys = {k: v for k, v in recipe.objective.items() if k != "name"}
    schema = recipe.keys_schema().model_validate(keys)
    return recipe.kind(**networks, **{k: getattr(schema, k) for k in keys})  # pyright: ignore


def backbones(networks: dict[str, nn.Module]) -> list[nn.Module]:
    """The distinct backbones in a set of networks: adapters share one."""
    shared = []
    for network in networks.values():
        for module in network.modules():
            if isinstance(module, AdaptedDenoiser | Network):
                shared.append(network_of(module).backbone)
    return list(dict.fromkeys(shared))


def player_networks(objective: Objective) -> dict[str, nn.Module]:
    """The networks that learn, by field: all but the teacher, and those with weights."""
    frozen = {"teacher"} if objective.trains == "student" else {"teacher", "student"}
    names = [n for n in networks_of(type(objective)) if n not in frozen]
    fields = {n: getattr(objective, n) for n in names}
    return {n: v for n, v in fields.items() if v is not None and any(True for _ in v.parameters())}
