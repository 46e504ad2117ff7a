"""The doctor: is a teacher's network used as it was trained? To be run before a costly training.

There are two kinds of checks. Structure holds for any weights: process, conversions, gradients,
batches. Evidence needs trained weights and images: see `evidence.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from teachers.conditions import moved, rows
from teachers.denoiser import PREDICTIONS, Denoiser, Guided
from teachers.diagnosis.checks import Check, Subject, check, noise_like, relative
from teachers.diagnosis.evidence import denoising, description
from teachers.errors import UserError
from teachers.process import Process
from teachers.teacher import Pixels, Teacher


def examine(
    teacher: Teacher,
    images: Tensor,
    prompts: Sequence[Any] | None = None,
    guided: Guided | None = None,
    structure_only: bool = False,
) -> list[Check]:
    """Every check of a teacher; each relies on those before it.

    Args:
        images: (N, C, H, W) in [-1, 1], similar to the training images.
        prompts: The prompts or labels of the N images; None when they are not known.
        guided: The guidance to examine; by default classifier-free with g = 3.
        structure_only: Leave out the checks that need trained weights.
    """
    checks = list(checks_of("process", lambda: clocks(teacher.denoiser.process)))
    subject: list[Subject] = []

    def encode() -> Iterator[Check]:
        subject.append(subject_of(teacher, images, prompts, guided))
        got, want = ("×".join(map(str, s)) for s in (subject[0].x.shape[1:], teacher.shape))
        yield check(
            "shape of data", float(got == want), want, got == want,
            f"teacher.shape: the codec makes {got} and the teacher declares {want}",
        )  # fmt: skip

    checks += checks_of("codec", encode)
    if not subject or checks[-1].verdict == "broken":
        return checks
    for name, part in STRUCTURE.items():
        checks += checks_of(name, lambda part=part: part(subject[0]))
    for name, part in EVIDENCE.items():
        if structure_only:
            checks.append(Check(name, None, "left out by --structure-only", "left out"))
        else:
            checks += checks_of(name, lambda part=part: part(subject[0]))
    return checks


def checks_of(name: str, part: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The checks of a part; a teacher that raises an exception fails one more.

    Raises:
        UserError: the teacher's own, such as for a prompt that is no label.
    """
    try:
        yield from part()
    except UserError:  # the fault of a prompt or an option, and not of the teacher
        raise
    except Exception as error:  # a user's own code may raise anything
        first = (str(error).strip().splitlines() or ["no message"])[0]
        reason = f"{name}: the adapter raised {type(error).__name__}: {first}"
        yield Check(name, None, "runs", "broken", reason)


def subject_of(
    teacher: Teacher, images: Tensor, prompts: Sequence[Any] | None, guided: Guided | None
) -> Subject:
    """The teacher with its data, on its device."""
    codec, n = teacher.codec, len(images)
    tensors = [*teacher.denoiser.parameters(), *teacher.denoiser.buffers()]
    device = tensors[0].device if tensors else images.device
    null = codec.null
    if prompts is not None:
        cond = codec.condition(list(prompts))
    elif null is not None:
        cond = {k: v.expand(n, *v.shape[1:]) for k, v in null.items()}
    else:
        cond = codec.condition([0] * n)
    cond = moved(cond, device)
    if guided is None and null is not None:
        guided = Guided(teacher.denoiser, 3.0, null)
    with torch.no_grad():
        x = codec.encode(images).to(device).float()
    return Subject(teacher, images, x, cond, prompts is not None, guided)


# The process: checks that need no network.


def clocks(process: Process) -> Iterator[Check]:
    """Ends of the schedule, monotonicity, the inverse, and every conversion and its inverse."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha, sigma = process.scales(t)
    low, high = (sigma[0] / alpha[0]).item(), (sigma[-1] / alpha[-1].clamp(min=1e-30)).item()
    where = "scheduler betas, sigma_min/sigma_max or shift: "
    yield check(
        "α at t = 0", alpha[0].item(), "1 ± 0.01", abs(alpha[0].item() - 1) <= 0.01,
        f"{where}t = 0 must be data, and α is {alpha[0]:.3g} there",
    )  # fmt: skip
    yield check(
        "σ/α at t = 0", low, "≤ 0.1", low <= 0.1,
        f"{where}t = 0 must be data, and σ/α is {low:.3g} there",
    )  # fmt: skip
    yield check(
        "σ/α at t = 1", high, "≥ 5", high >= 5,
        f"{where}t = 1 must be noise, and σ/α is {high:.3g} there",
    )  # fmt: skip
    rise = torch.cat([-alpha.diff(), sigma.diff()]).min().item()
    strictly = (sigma[1:] * alpha[:-1] > sigma[:-1] * alpha[1:]).all().item()
    yield check(
        "α falls, σ rises", rise, "≥ 0", rise >= -1e-12 and bool(strictly),
        "scheduler betas or sigmas: α must fall and σ rise with t; is the time reversed?",
    )  # fmt: skip
    inner = t[1:-1]
    gap = (process.time(sigma[1:-1] / alpha[1:-1]) - inner).abs().max().item()
    yield check(
        "time inverts scales", gap, "≤ 1e-6", gap <= 1e-6,
        "process.time: it must give the t at which σ/α is its argument",
    )  # fmt: skip
    yield from conversions(process)


def conversions(process: Process) -> Iterator[Check]:
    """x̂ from ε, v and flow, and the process's methods against their inverses, in float64."""
    x, eps = torch.randn(2, 16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.05, 0.95, 16, dtype=torch.float64)
    s, h = t * 0.5, 1e-5
    alpha, sigma = process.at(t, x)
    x_t = process.noise(x, t, eps)
    truth = {"x": x, "eps": eps, "v": alpha * eps - sigma * x, "flow": eps - x}
    worst = 0.0
    for name, out in truth.items():
        skip, gain = PREDICTIONS[name](alpha, sigma)
        worst = max(worst, relative(skip * x_t + gain * out, x))
    yield check(
        "x̂ of ε, v and flow", worst, "≤ 1e-6", worst <= 1e-6,
        "process.scales: x̂ does not follow from ε, v and flow; x_t must be α x + σ ε",
    )  # fmt: skip
    gap = relative(process.eps(x_t, x, t), eps)
    gap = max(gap, relative(process.end(x_t, process.step(x_t, x, t, s), t, s), x))
    yield check(
        "ε and end undo noise and step", gap, "≤ 1e-6", gap <= 1e-6,
        "process.eps or process.end: they do not undo process.noise and process.step",
    )  # fmt: skip
    slope = (process.noise(x, t + h, eps) - process.noise(x, t - h, eps)) / (2 * h)
    gap = relative(process.velocity(x_t, x, t), slope)
    # a table has kinks, at which the two sides' slopes differ a little
    yield check(
        "velocity is dx_t/dt", gap, "≤ 0.01", gap <= 0.01,
        "process.velocity: it is not the slope of process.noise over t",
    )  # fmt: skip


# Structure: checks that hold for any weights.


@torch.no_grad()
def outputs(subject: Subject) -> Iterator[Check]:
    """x̂ is finite at the ends, float32, repeatable, and independent of the rest of the batch."""
    denoiser, x, cond = subject.denoiser, subject.x, subject.cond
    process = denoiser.process
    for t in (0.0, 1.0):
        at = x.new_full((len(x),), t)
        out = denoiser(process.noise(x, at, noise_like(x)), at, cond)
        share = out.isfinite().float().mean().item()
        good = share == 1 and out.shape == x.shape
        yield check(
            f"finite at t = {t:g}", share, "all, shaped like x_t", good,
            (share < 1 and not_finite(subject.teacher))
            or f"call(): x̂ at t = {t:g} is not finite or not shaped like x_t; a time unit, or a "
            "prediction_type of epsilon where α is 0",
        )  # fmt: skip
    x_t, t = subject.noised(x.std().item())
    first = next(denoiser.parameters(), torch.zeros(1))
    half = first.dtype in (torch.bfloat16, torch.float16)
    # float32 weights run under autocast, as in a bf16 training
    with torch.autocast(x.device.type, torch.bfloat16, enabled=not half):
        out = denoiser(x_t, t, cond)
    yield check(
        "float32 x̂ in half precision", float(out.element_size()), "4 bytes or more",
        out.element_size() >= 4,
        f"call(): x̂ is {out.dtype}; convert the network's output to float32 before the conversion",
    )  # fmt: skip
    once = denoiser(x_t, t, cond)
    gap = relative(denoiser(x_t, t, cond), once)
    yield check(
        "the same twice", gap, "≤ 1e-5", gap <= 1e-5 and not denoiser.training,
        "call(): two calls differ; put the network in eval mode and draw nothing in it",
    )  # fmt: skip
    if len(x) > 1:
        other = x_t.clone()
        other[1:] = -2 * other[1:].flip(0) + 1
        gap = relative(denoiser(other, t, cond)[:1], once[:1])
        yield check(
            "batch independence", gap, "≤ 1e-4", gap <= 1e-4,
            "call(): a sample's x̂ changes with the others in its batch; what mixes them?",
        )  # fmt: skip


def not_finite(teacher: Teacher) -> str:
    """A remedy that names the weights of the teacher that are not finite; empty if all are."""
    members: dict[str, Any] = {"": teacher.denoiser, **vars(teacher.codec)}
    pipe = members.pop("pipe", None)
    # the pipeline's denoiser network is the denoiser's own and is named there
    own = {id(m) for m in teacher.denoiser.modules()}
    parts = {} if pipe is None else {k: v for k, v in pipe.components.items() if id(v) not in own}
    wrong = [
        f"{part}.{name}".lstrip(".")
        for part, module in {**members, **parts}.items()
        if isinstance(module, torch.nn.Module)
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and value.is_floating_point()
        and not value.float().isfinite().all()
    ]  # fmt: skip
    if not wrong:
        return ""
    rest = f" and {len(wrong) - 1} more" * (len(wrong) > 1)
    return (
        f"weights: {wrong[0]}{rest} hold NaN or infinity; the file is damaged, or its training "
        "diverged: give another checkpoint"
    )


def gradients(subject: Subject) -> Iterator[Check]:
    """Gradients reach x and the weights; recomputing activations does not change them."""
    denoiser = subject.denoiser
    few = slice(0, 2)
    x_t, t = (v[few] for v in subject.noised(subject.x.std().item()))
    cond = rows(subject.cond, few)
    # every block has one-dimensional weights, and their gradients take little memory
    weights = [p for p in denoiser.parameters() if p.is_floating_point() and p.ndim <= 1]
    weights = weights or [p for p in denoiser.parameters() if p.is_floating_point()]
    before = [p.requires_grad for p in weights]

    def slopes(recompute: bool) -> list[Tensor]:
        x = x_t.detach().clone().requires_grad_()
        if recompute:
            out = checkpoint(denoiser, x, t, cond, use_reentrant=False)
        else:
            out = denoiser(x, t, cond)
        assert isinstance(out, Tensor)
        loss = (out * noise_like(out)).sum()
        grads = torch.autograd.grad(loss, [x, *weights], allow_unused=True)
        return [torch.zeros(1) if g is None else g.detach().float().cpu() for g in grads]

    try:
        for p in weights:
            p.requires_grad_(True)
        plain = slopes(False)
        with recomputing(denoiser) as inside:
            again = slopes(not inside)
    finally:
        for p, was in zip(weights, before):
            p.requires_grad_(was)
    cause = "call(): something in it detaches, or runs under no_grad"
    size = plain[0].norm().item()
    yield check("gradient of x", size, "> 0, finite", 0 < size < math.inf, f"{cause}: x's gradient")
    if weights:
        whole = torch.cat([g.flatten() for g in plain[1:]]).norm().item()
        yield check(
            "gradient of the weights", whole, "> 0, finite", 0 < whole < math.inf,
            f"{cause}: the weights' gradient",
        )  # fmt: skip
    flat, flat_again = (torch.cat([g.flatten() for g in v]) for v in (plain, again))
    gap = relative(flat_again, flat)
    yield check(
        "gradients, recomputed", gap, "≤ 1e-3", gap <= 1e-3,
        "gradient checkpointing: recomputed activations give other gradients; the backbone is not "
        "the same function twice",
    )  # fmt: skip


@contextmanager
def recomputing(denoiser: Denoiser) -> Iterator[bool]:
    """Turn on the backbone's own gradient checkpointing; yields whether it has any."""
    from diffusers import ModelMixin

    own = [
        m for m in denoiser.modules()
        if isinstance(m, ModelMixin) and m._supports_gradient_checkpointing
        and not m.is_gradient_checkpointing
    ]  # fmt: skip
    for m in own:
        m.enable_gradient_checkpointing()
    try:
        yield bool(own)
    finally:
        for m in own:
            m.disable_gradient_checkpointing()


@torch.no_grad()
def conditions(subject: Subject) -> Iterator[Check]:
    """The condition changes x̂, and guidance moves from the null x̂ past the conditional one."""
    codec, guided = subject.teacher.codec, subject.guided
    if guided is None or codec.null is None:
        yield Check("guidance", None, "the teacher has no null condition", "left out")
        return
    x_t, t = subject.noised(subject.x.std().item())
    n, device = len(x_t), x_t.device
    null = {k: v.to(device).expand(n, *v.shape[1:]) for k, v in codec.null.items()}
    cond = subject.cond
    if not subject.described:
        classes = codec.classes
        cond = codec.condition([0] * n if classes else ["a photograph of a red house"] * n)
        cond = moved(cond, device)
    negative, positive = subject.denoiser(x_t, t, null), subject.denoiser(x_t, t, cond)
    gap = relative(positive, negative)
    yield check(
        "the condition is heard", gap, "> 1e-7", gap > 1e-7,
        "call(): x̂ is the same with the condition and without; pass cond to the backbone",
    )  # fmt: skip
    away = positive - negative
    along = ((guided(x_t, t, cond) - negative) * away).sum() / away.square().sum()
    yield check(
        f"guidance direction, g = {guided.scale:g}", along.item(), "> 1", along.item() > 1,
        "guidance: it moves towards null and not away from it: its sign is flipped, or the halves "
        "of its batch are swapped",
    )  # fmt: skip


STRUCTURE: dict[str, Callable[[Subject], Iterator[Check]]] = {
    "outputs": outputs,
    "gradients": gradients,
    "conditions": conditions,
}


# Evidence: checks that need trained weights and images.


@torch.no_grad()
def round_trip(subject: Subject) -> Iterator[Check]:
    """The codec reproduces images, and its data have the scale that networks are trained on."""
    back = subject.teacher.codec.decode(subject.x.to(subject.images.device))
    back = back.to(subject.images)
    if back.ndim > 2 and not isinstance(subject.teacher.codec, Pixels):  # others have no range
        back = back.clamp(-1, 1)
    error = (back - subject.images).square().mean().item()
    psnr = min(10 * math.log10(4 / max(error, 1e-30)), 100.0)
    yield check(
        "decode(encode(image)), PSNR", psnr, "≥ 18 dB", psnr >= 18,
        "vae scaling_factor/shift_factor: decode does not undo encode; they must use the same two, "
        "or give --image a picture such as it was trained on",
    )  # fmt: skip
    if isinstance(subject.teacher.codec, Pixels):
        return
    std = subject.x.std().item()
    yield check(
        "deviation of the data", std, "0.2 to 5", 0.2 <= std <= 5,
        f"vae scaling_factor: the data's deviation is {std:.3g}; about 1 is usual, so multiply the "
        f"factor by about {1 / max(std, 1e-9):.3g}",
    )  # fmt: skip


EVIDENCE: dict[str, Callable[[Subject], Iterator[Check]]] = {
    "codec round trip": round_trip,
    "denoising": denoising,
    "description": description,
}


def dead_leaves(n: int, channels: int, size: tuple[int, int]) -> Tensor:
    """n images (n, channels, *size) in [-1, 1] in place of photographs; the same at every call.

    Discs of all sizes that hide one another have the edges, flat parts and scales of natural
    images.
    """
    draw = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(*(torch.arange(k) / min(size) for k in size), indexing="ij")
    pictures = torch.zeros(n, channels, *size)
    for picture in pictures:
        for _ in range(200):
            u = torch.rand(3, generator=draw)
            radius = 0.05 / (0.02 + u[0]) ** 0.6  # many small, few large
            y, x = u[1] * size[0] / min(size), u[2] * size[1] / min(size)
            inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
            tone = torch.rand(channels, generator=draw) * 2 - 1
            picture[:, inside] = tone[:, None]
    return pictures
