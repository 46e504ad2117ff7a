"""The plan of a recipe: its networks are made of fake tensors, and its turns are played."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from distill.config.optimizer import OptimizerConfig
from distill.config.recipe import Recipe
from distill.config.schema import TeacherSection
from distill.data.encode import at_once
from distill.objectives.base import Batch, Objective
from distill.planning.plan import Plan, play
from distill.profiling import FlopMeter, FusedAttention, Meter, unique
from distill.rates import family_of
from distill.training import custom_objective
from distill.training.compilation import wanted_mode
from distill.training.networks import assembled, build_networks, form_for, path_of, player_networks
from distill.training.optimizers import optimizer_bytes
from students.export.forms import StockForm
from students.lora import network_of, unwrap, view_of
from students.own_network import is_own
from teachers import conditions
from teachers.catalogue.loading import load
from teachers.catalogue.outlines import OUTLINES, OutlineCodec, dtype_of_new, outline
from teachers.errors import UserError, clipped, first_line, teacher_at
from teachers.quantised import FORMS, parameters, quantise
from teachers.storage.diffusers_config import CM
from teachers.storage.files import home
from teachers.teacher import Codec, Teacher


def played(
    recipe: Recipe, objective: Objective, movers: dict[str, list[nn.Parameter]], batch: Batch
) -> tuple[int, int, float, dict[str, float]]:
    """What `play` returns, over the whole of training: its first steps and those of its last stage.

    Memory is the larger one's; work is their mean, each weighted by its share of the steps.
    """
    train, last = recipe.train, objective.last_stage
    share = min(last / train.steps, 1.0)  # of the steps before the last stage
    every = max(getattr(objective, "student_every", 1), 4)
    total, memory = 0.0, (0, 0)
    evaluations: dict[str, float] = {}
    if hasattr(objective, "promoted"):  # it copies the student: torch crashes on fake tensors
        vars(objective)["promoted"] = lambda: objective.student.denoiser
    for first, weight in ((0, share), (last, 1 - share)):
        if not weight:
            continue
        random.seed(0)
        most, gradients, flops, counts = play(
            objective, movers, batch, train.accumulate, every, train.precision, compiles(recipe),
            first,
        )  # fmt: skip
        memory = max(memory, (most, gradients), key=sum)
        total += weight * flops
        evaluations = {k: evaluations.get(k, 0.0) + weight * n for k, n in counts.items()}
    return *memory, total, evaluations


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
    base = parameters(network_of(teacher.denoiser).backbone)  # before adapters are on it
    form, student = form_for(recipe, teacher), recipe.student
    if isinstance(form, StockForm):  # values, which fake tensors lack, decide the times
        form = form.fixed(student.steps, student.start, student.renoise)
    with fake, no_moves():
        networks = build_networks(recipe, teacher, form)
        objective = assembled(recipe, networks, torch.device("cpu"))
    with fake:
        movers = movers_of(recipe, objective)
        x = torch.zeros(n, *teacher.shape)
        cond = teacher.codec.condition([0] * n)
        cond = conditions.each(cond, torch.clone)
        batch = Batch(x if recipe.needs_data else None, x.clone(), cond, path=path_of(recipe, x))
        smaller = smaller_of(recipe, teacher, objective, batch)
        with explained(recipe, teacher):
            most, gradients, flops, evaluations = played(recipe, objective, movers, batch)
    networks = [v for v in vars(objective).values() if isinstance(v, nn.Module)]
    tensors = [t for n in networks for t in (*n.parameters(), *n.buffers())]
    weights = unique(tensors)
    held, host = moments_of(recipe, movers)
    average = 4 * sum(p.numel() for p in movers[objective.trains]) if train.ema else 0
    beside, codes = encoders(teacher), coding(recipe, teacher, fake)
    drawing = weights + held + 2 * average + codes.decoding
    return Plan(
        weights=weights,
        gradients=gradients,
        optimizer=held,
        average=average,
        activations=most,
        beside=beside,
        build=max(beside + codes.encoding, weights + codes.decoding),
        grids=drawing if train.sample_every and form.leaves_pipeline else 0,
        family=family_of(network_of(teacher.denoiser)),
        adapter="full" if recipe.adapters is None else recipe.adapters.kind,
        base=base,
        batch=train.batch,
        precision=precision_of(recipe),
        evaluations=evaluations,
        flops=flops,
        host=host,
        smaller=smaller,
    )


@torch.no_grad()
def smaller_of(
    recipe: Recipe, teacher: Teacher, objective: Objective, batch: Batch
) -> tuple[int, float] | None:
    """The weights of a student of another architecture, and its work as a share of the teacher's;
    None of other students."""
    student = recipe.student
    if student.architecture is None and student.init is None:
        return None
    work, counts = [], []
    t = torch.ones(len(batch.noise))
    for network in (network_of(objective.student.denoiser), network_of(teacher.denoiser)):
        with FlopMeter() as meter:
            network(batch.noise, t, batch.cond)
        work.append(meter.flops)
        counts.append(parameters(network.backbone))
    same = counts[0] == counts[1] and work[0] == work[1]
    return None if same else (counts[0], work[0] / work[1])


def compiles(recipe: Recipe) -> bool:
    """Whether a run on a GPU compiles its networks."""
    return wanted_mode(recipe, torch.device("cuda")) != "off"


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
    if is_own(teacher.denoiser):
        return shape_of_own(teacher, fake)
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


def shape_of_own(teacher: Teacher, fake: Any) -> Teacher:
    """A network of the user's own on fake tensors: a copy of it, since no config builds it."""
    from torch._subclasses.fake_tensor import FakeCopyMode

    twin = view_of(network_of(teacher.denoiser))
    with FakeCopyMode(fake):
        twin.backbone = deepcopy(twin.backbone).requires_grad_(False).eval()
    return Teacher(twin, FakeCodec(teacher.codec), teacher.shape, teacher.source)


@contextmanager
def explained(recipe: Recipe, teacher: Teacher) -> Iterator[None]:
    """Within it, what the user's own code cannot do without values is a UserError.

    Raises:
        UserError: naming the network or the objective, and what its code raised.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's own code may raise anything
        if custom_objective.file_of(recipe) is not None:
            who = f"objective.name: {clipped(recipe.objective['name'])}"
        elif recipe.student.network is not None:
            who = f"student.architecture.network: {clipped(recipe.student.network)!r}"
        elif is_own(teacher.denoiser):
            who = teacher_at(teacher.source)
        else:
            raise
        reason = clipped(f"{type(error).__name__}: {first_line(error)}", 150)
        raise UserError(
            f"{who}: it cannot be planned, since its code reads values that a plan has none of "
            f"({reason}); try a step of the run on the card itself"
        ) from None


class FakeCodec(Codec):
    """A codec that gives every prompt the same condition, encoded before tensors are fake."""

    def __init__(self, codec: Codec) -> None:
        self.classes = codec.classes
        self.null_label = codec.null_label
        self.null, self.one = codec.null, codec.condition([0])
        self.pipe, self.vae, self.pictures = codec.pipe, codec.vae, codec.pictures

    def condition(self, prompts: Sequence[Any]) -> Any:
        n = len(prompts)
        return self.one and {k: v.expand(n, *v.shape[1:]) for k, v in self.one.items()}

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def precision_of(recipe: Recipe) -> str:
    """The precision of most products: the teacher's where autocast is off."""
    if recipe.train.precision != "fp32":
        return recipe.train.precision
    return recipe.teacher.precision or "fp32"


def movers_of(recipe: Recipe, objective: Objective) -> dict[str, list[nn.Parameter]]:
    """The weights that learn, by player."""
    return {
        name: recipe.players.get(name, OptimizerConfig()).learning(network, name)
        for name, network in player_networks(objective).items()
    }


def moments_of(recipe: Recipe, movers: dict[str, list[nn.Parameter]]) -> tuple[int, int]:
    """Bytes of all optimisers' moments: on the device, and in host memory."""
    sizes = [
        optimizer_bytes(recipe.players.get(name, OptimizerConfig()).optimizer, moving)
        for name, moving in movers.items()
    ]
    return sum(device for device, _ in sizes), sum(host for _, host in sizes)


class Coding(NamedTuple):
    """Bytes on the device beside the other networks, while images are encoded or decoded.

    encoding: The activations of the VAE, of as many images as it encodes at one time.
    decoding: The VAE and its activations, of one image.
    """

    encoding: int = 0
    decoding: int = 0


def coding(recipe: Recipe, teacher: Teacher, fake: Any) -> Coding:
    """What the VAE of a teacher's pipeline takes.

    Args:
        fake: The FakeTensorMode of the teacher's weights.
    """
    if (vae := fake_vae(teacher, fake)) is None:
        return Coding()
    side = pixels_per_latent(teacher)
    size = (teacher.shape[-2] * side, teacher.shape[-1] * side)
    channels, frames = teacher.shape[0], teacher.shape[1:-2]
    network = unwrap(teacher.denoiser)
    framed = (1,) if getattr(network, "FRAMED", False) else ()
    encoding = 0
    with fake, torch.no_grad():
        # pictures of prompts are encoded one by one
        count = at_once(*size) if recipe.needs_data else int(bool(teacher.codec.pictures))
        if count and not frames:
            encoding = most_bytes(vae.encode, torch.zeros(count, 3, *framed, *size))
        latent = torch.zeros(1, channels, *(frames or framed), *teacher.shape[-2:])
        decoding = most_bytes(vae.decode, network.uncelled(latent))
    return Coding(encoding, unique((*vae.parameters(), *vae.buffers())) + decoding)


def most_bytes(function: Callable[[torch.Tensor], Any], x: torch.Tensor) -> int:
    """The most bytes that a call holds at one time, with x."""
    with Meter(set()) as meter, FusedAttention(meter):
        function(x.clone())
    return meter.most


def fake_vae(teacher: Teacher, fake: Any) -> Any:
    """The VAE of a teacher's pipeline, of fake tensors in float32; None if it has none.

    An outline's has the usual network of its kind: Stable Diffusion's, FLUX.2's or VA-VAE for 16
    pixels to a latent, or DC-AE for 32.
    """
    import diffusers

    codec: Any = teacher.codec
    if isinstance(codec, OutlineCodec):
        kinds = {
            8: diffusers.AutoencoderKL, 16: diffusers.AutoencoderKL, 32: diffusers.AutoencoderDC,
        }  # fmt: skip
        kind, config = kinds.get(codec.outline.factor), {}
        if codec.outline.pipeline.startswith("Flux2"):
            kind = diffusers.AutoencoderKLFlux2
        elif codec.outline.pipeline.startswith(("QwenImage", "Krea2")):
            kind = diffusers.AutoencoderKLQwenImage
        elif kind is diffusers.AutoencoderKL:
            widths = (128, 256, 512, 512)
            if codec.outline.factor == 16:
                widths = (128, 128, 256, 256, 512)
            config = {
                "block_out_channels": widths, "layers_per_block": 2,
                "down_block_types": ("DownEncoderBlock2D",) * len(widths),
                "up_block_types": ("UpDecoderBlock2D",) * len(widths),
                "latent_channels": teacher.shape[0],
            }  # fmt: skip
    else:
        vae = None if is_own(teacher.denoiser) else codec.vae  # a user's own has no config
        kind, config = (None, {}) if vae is None else (type(vae), vae.config)
    if kind is None:
        return None
    with fake, dtype_of_new(torch.float32):
        vae: Any = kind.from_config(config)
    return vae.eval()


def pixels_per_latent(teacher: Teacher) -> int:
    """Pixels per latent along one side."""
    codec: Any = teacher.codec
    if isinstance(codec, OutlineCodec):
        return codec.outline.factor
    return unwrap(teacher.denoiser).per_latent


def encoders(teacher: Teacher) -> int:
    """Bytes of text encoders and VAE, in float32 as they are read."""
    codec: Any = teacher.codec
    if isinstance(codec, OutlineCodec):
        return 4 * codec.outline.encoder_parameters
    if is_own(teacher.denoiser):
        return 0
    if (pipe := codec.pipe) is None:
        modules = [] if codec.vae is None else [codec.vae]
    else:
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
