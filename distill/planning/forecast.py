"""The plan of a recipe: its networks are made of fake tensors, and its turns are played."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from distill.config.optimizer import OptimizerConfig
from distill.config.recipe import Recipe
from distill.config.schema import TeacherSection
from distill.objectives.base import Batch
from distill.planning.plan import Plan, play
from distill.profiling import unique
from distill.training.networks import assembled, build_networks, player_networks
from distill.training.optimizers import optimizer_bytes
from students.export.forms import StockForm, form_of
from students.lora import unwrap
from teachers import conditions
from teachers.catalogue.loading import load
from teachers.catalogue.outlines import OUTLINES, OutlineCodec, dtype_of_new, outline
from teachers.quantised import FORMS, parameters, quantise
from teachers.storage.diffusers_config import CM
from teachers.storage.files import home
from teachers.teacher import Codec, Teacher


def plan(recipe: Recipe, shape: Callable[[Any], Teacher] | None = None) -> Plan:
    """What a run of this recipe takes on one device, without allocating its memory.

    Args:
        shape: Makes the teacher of fake tensors in the FakeTensorMode that it is given; by default
            it is the recipe's.

    Raises:
        UserError: the teacher has no files here, and its outline is not known.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode(allow_non_fake_inputs=True)
    teacher = shape_of(recipe.teacher, fake) if shape is None else shape(fake)
    train, parts = recipe.train, recipe.train.accumulate
    n = train.batch // parts
    base = parameters(unwrap(teacher.denoiser).backbone)  # before adapters are on it
    form, student = form_of(teacher, recipe.kind.few_step), recipe.student
    if isinstance(form, StockForm):  # values, which fake tensors lack, decide the times
        form = form.fixed(student.steps, student.start, student.renoise)
    with fake, no_moves():
        networks = build_networks(recipe, teacher, form)
        objective = assembled(recipe, networks, torch.device("cpu"))
    with fake:
        movers = {k: list(v.parameters()) for k, v in player_networks(objective).items()}
        x = torch.zeros(n, *teacher.shape)
        cond = teacher.codec.condition([0] * n)
        cond = conditions.each(cond, torch.clone)
        batch = Batch(x if recipe.needs_data else None, x.clone(), cond)
        steps = getattr(objective, "student_every", 1)
        random.seed(0)
        most, gradients, flops, evaluations = play(
            objective, movers, batch, parts, max(steps, 4), train.precision
        )
    networks = [v for v in vars(objective).values() if isinstance(v, nn.Module)]
    tensors = [t for n in networks for t in (*n.parameters(), *n.buffers())]
    moments = [
        optimizer_bytes(recipe.players.get(name, OptimizerConfig()).optimizer, moving)
        for name, moving in movers.items()
    ]
    return Plan(
        weights=unique(tensors),
        gradients=gradients,
        optimizer=sum(device for device, _ in moments),
        average=4 * sum(p.numel() for p in movers["student"]) if train.ema else 0,
        activations=most,
        beside=encoders(teacher),
        base=base,
        batch=train.batch,
        precision=train.precision
        if train.precision != "fp32"
        else recipe.teacher.precision or "fp32",
        evaluations=evaluations,
        flops=flops,
        host=sum(host for _, host in moments),
    )


def shape_of(section: TeacherSection, fake: Any) -> Teacher:
    """The teacher with a network of fake tensors: from its files, or from its outline.

    Args:
        fake: The FakeTensorMode that the weights are made in.

    Raises:
        UserError: it can be loaded from neither.
    """
    source, precision = section.source, section.precision
    if source in OUTLINES and not home(source, "teacher.source").exists():
        return outline(source, fake, section.size, precision or "fp32")
    teacher = load(source, **section.options())
    network = unwrap(teacher.denoiser)
    before: Any = network.backbone
    with fake, dtype_of_new(next(before.parameters()).dtype):
        backbone = type(before).from_config(before.config)
        if precision in FORMS:
            quantise(backbone, precision)
    # refitting an EDM student's time takes values, and fake weights have none
    named = replace(network.schedule, name=CM if network.schedule.sigma_data else "")
    twin = network.twin(backbone.requires_grad_(False).eval(), named)
    return Teacher(twin, FakeCodec(teacher.codec), teacher.shape, teacher.source)


class FakeCodec(Codec):
    """A codec that gives every prompt the same condition, encoded before tensors are fake."""

    def __init__(self, codec: Codec) -> None:
        self.classes = codec.classes
        self.null_label = codec.null_label
        self.null, self.one = codec.null, codec.condition([0])
        self.pipe = codec.pipe

    def condition(self, prompts: Sequence[Any]) -> Any:
        n = len(prompts)
        return self.one and {k: v.expand(n, *v.shape[1:]) for k, v in self.one.items()}

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def encoders(teacher: Teacher) -> int:
    """Bytes of text encoders and VAE, in float32 as they are read."""
    codec: Any = teacher.codec
    if isinstance(codec, OutlineCodec):
        return 4 * codec.outline.encoder_parameters
    if (pipe := codec.pipe) is None:
        return 0
    part = unwrap(teacher.denoiser).PART
    modules = [v for k, v in pipe.components.items() if k != part and isinstance(v, nn.Module)]
    return sum(p.nbytes for m in modules for p in m.parameters())


@contextmanager
def no_moves() -> Iterator[None]:
    """Inside it, `nn.Module.to` returns the module as it is: torch cannot move fake weights.

    PEFT calls it on every adapter that it makes (docs/decisions/0007).
    """
    to = nn.Module.to
    nn.Module.to = lambda self, *args, **kwargs: self
    try:
        yield
    finally:
        nn.Module.to = to
