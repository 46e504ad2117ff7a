"""Students in the forms that stock diffusers pipelines sample exactly.

A student is exported as a plain folder. So its parametrisation and its times are those of a
scheduler of diffusers, chosen here before training:

| teacher | next time by | scheduler | times |
|---|---|---|---|
| EDM | renoising | CMStochasticIterative | equal steps in σ^(1/ρ), on its 40-level grid |
| EDM, a UNet2DModel | the ODE | EDMEuler | equal steps in σ^(1/ρ), of one count only |
| EDM, a UNet2DModel | the posterior | EDMDPMSolverMultistep, SDE of order 1 | the same |
| DDPM betas | renoising | LCM | equal steps of its 50-index grid |
| DDPM betas | renoising in part (`student.gamma`) | TCD | the same |
| DDPM betas | the ODE | DDIM, trailing | equal steps of the index |
| flow | renoising | FlowMatchEuler, stochastic | its own for each count |
| flow | the ODE | FlowMatchEuler | its own for each count |

Students of pixels run in `ConsistencyModelPipeline`, which passes labels to a UNet2DModel; others
run in their teacher's own pipeline. EDM's networks that are no UNet2DModel run in the former as
well, with their own source beside their weights (`export/sources/edm.py`); those of latents, in a
subclass of it that decodes. SiT, LightningDiT and U-ViT run in `DiTPipeline`, with theirs
(`export/sources/imagenet.py`).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from students.generator import Generator, Renoise, divisor_grids
from students.lora import AdaptedDenoiser, Adapter, to_float32, unwrap, with_schedule
from teachers.denoiser import Prediction, coefficients, edm
from teachers.edm.latents import Latents
from teachers.errors import UserError
from teachers.families.base import Pretrained
from teachers.process import Karras, Linear, Tabulated
from teachers.quantised import is_quantised
from teachers.storage.diffusers_config import CM, Schedule, Time, log_sigma
from teachers.teacher import Teacher

CM_LEVELS = 40  # CMStochasticIterativeScheduler's default, rounded up to a multiple of the steps
LCM_LEVELS = 50  # LCMScheduler's original_inference_steps
LCM_SCALE, LCM_DATA = 10.0, 0.5  # its boundary: c_skip = d² / ((10 i)² + d²) at index i


@dataclass(frozen=True)
class SchedulerForm:
    """A few-step student's parametrisation and times, those of a stock scheduler.

    Args:
        grids: The times for each step count, from noise to data.
        renoise, floor, start: As `Generator` has them.
    """

    schedule: Schedule
    grids: dict[int, tuple[float, ...]]
    renoise: Renoise
    floor: float = 0.0
    start: float | None = None

    def generator(self, denoiser: Any) -> Generator:
        """A student of this form, from its network."""
        steps = max(self.grids)
        return Generator(
            denoiser, self.grids[steps], self.renoise, self.floor, self.start, self.grids
        )


def form(
    network: Pretrained,
    steps: int = 1,
    start: float | None = None,
    renoise: Renoise = True,
    exported: bool = False,
) -> SchedulerForm:
    """The scheduler form of a student of this network.

    Args:
        steps: The largest step count; smaller ones divide it.
        start: σ/α of the noise that it starts from; by default the teacher's highest.
        renoise: Move to the next time by renoising, along the ODE, or by the posterior.
        exported: The network is already such a student, read from its folder.

    Raises:
        UserError: no stock scheduler samples such a student.
    """
    if not 1 <= steps <= CM_LEVELS:
        raise UserError(f"student.steps: {steps} is out of range; give 1 to {CM_LEVELS}")
    process = network.process
    if start is not None and not isinstance(process, Karras):
        raise UserError("student.start: only EDM students choose where they start; leave it out")
    if isinstance(process, Karras):
        if renoise is True or steps == 1:
            return _consistency(network.schedule, process, steps, start)
        return _edm(network, process, steps, start, renoise, exported)
    if renoise == "posterior":
        raise UserError(
            "student.renoise: 'posterior' needs a teacher with EDM's noise and a UNet2DModel; set "
            "it to true or false"
        )
    if isinstance(process, Linear):
        return _flow(network, process, steps, renoise)
    if not isinstance(process, Tabulated):
        raise UserError(f"student: no stock scheduler knows a {type(process).__name__} process")
    return _ddpm(network.schedule, process, steps, renoise)


def _consistency(
    schedule: Schedule, process: Karras, steps: int, start: float | None
) -> SchedulerForm:
    first = _start_time(process, start)
    assert schedule.sigma_data is not None
    n = cm_levels(steps)
    times = [first * (1 - k * (n // steps) / (n - 1)) for k in range(steps)]
    schedule = replace(
        schedule,
        predicts=edm(schedule.sigma_data, process.sigma_min),
        time=log_sigma(process, 250.0),
    )
    return SchedulerForm(schedule, divisor_grids(times), True, floor=process.sigma_min)


def _edm(
    network: Pretrained,
    process: Karras,
    steps: int,
    start: float | None,
    renoise: Renoise,
    exported: bool,
) -> SchedulerForm:
    """The teacher's own parametrisation with Euler steps in σ, which equal DDIM's, or with samples
    of the posterior.

    The scheduler spaces its times from σ_max to σ_min, so σ_min of the exported scheduler is the
    student's last time, and there is one step count. An exported student's schedule has it already.
    """
    if not _is_unet2d(network) or network.schedule.name == CM:
        raise UserError(
            "student.renoise: stock pipelines follow the ODE of EDM's networks, or sample the "
            "posterior, only if they are a UNet2DModel with EDM's own scheduler; set it to true"
        )
    first = _start_time(process, start)
    times = [first * (1 - k / (steps - exported)) for k in range(steps)]
    sigma = process.scales(torch.tensor(first, dtype=torch.float64))[1].item()
    return SchedulerForm(
        network.schedule, {steps: tuple(times)}, renoise, start=(sigma**2 + 1) ** 0.5
    )


def _start_time(process: Karras, start: float | None) -> float:
    """The time at which an EDM student starts."""
    if start is None:
        return 1.0
    if not process.sigma_min < start <= process.sigma_max:
        raise UserError(
            f"student.start: {start} is out of range; give a noise level of the teacher, above "
            f"{process.sigma_min} and at most {process.sigma_max}"
        )
    return process.time(torch.tensor(start, dtype=torch.float64)).item()


def _ddpm(schedule: Schedule, process: Tabulated, steps: int, renoise: bool) -> SchedulerForm:
    if not renoise:
        if (process.last + 1) % steps:
            raise UserError(
                f"student.steps: {steps} does not divide the {process.last + 1} indices of the "
                "teacher's scheduler; give a count that does"
            )
        indices = [(round((process.last + 1) * (1 - k / steps)) - 1) for k in range(steps)]
        return SchedulerForm(
            schedule, divisor_grids([i / process.last for i in indices]), False, start=1.0
        )
    n = lcm_levels(process)
    if steps > n:
        raise UserError(f"student.steps: {steps} is out of range; the scheduler has {n} times")
    jump = (process.last + 1) // n
    grid = [jump * (i + 1) - 1 for i in reversed(range(n))]
    times = [grid[k * n // steps] / process.last for k in range(steps)]
    schedule = replace(schedule, predicts=partial(_lcm, process=process, own=schedule.predicts))
    return SchedulerForm(schedule, divisor_grids(times), True, start=1.0)


def _lcm(alpha: Tensor, sigma: Tensor, process: Tabulated, own: str | Prediction):
    """A DDPM network under latent consistency models' boundary (arXiv:2310.04378): x̂ = x at t = 0.

    The stock scheduler applies it, so the student is trained with it: c_skip x_t + c_out x̂. The
    coefficients differ from 0 and 1 at the lowest few indices only.
    """
    skip, out = coefficients(own)(alpha, sigma)
    index = process.index(process.time(sigma.double() / alpha.double()))
    scaled = (LCM_SCALE * index).to(alpha.dtype)
    total = scaled**2 + LCM_DATA**2
    keep, change = LCM_DATA**2 / total, scaled / total.sqrt()
    return keep + change * skip, change * out


def _flow(network: Pretrained, process: Linear, steps: int, renoise: bool) -> SchedulerForm:
    stock = flow_scheduler(network.schedule, process.shift, steps, renoise, network.GRID)
    grids: dict[int, tuple[float, ...]] = {}
    for k in [k for k in range(1, steps + 1) if steps % k == 0]:
        if k == 1 < steps and stock.config.shift_terminal:
            continue  # stretching needs two times
        even = np.linspace(1.0, 1 / k, k)
        stock.set_timesteps(k, sigmas=None if network.GRID == "own" else even)
        sigma = stock.sigmas[:-1].double()
        sigma = sigma.clamp(max=1)  # float32 shifting may exceed 1
        grids[k] = tuple(process.time(sigma / (1 - sigma)).tolist())
    return SchedulerForm(network.schedule, grids, renoise)


def flow_scheduler(schedule: Schedule, shift: float, steps: int, renoise: bool, grid: str) -> Any:
    """A FlowMatchEulerDiscreteScheduler for the way in which a family's pipeline sets its times.

    Without a terminal shift, pipelines that use the scheduler's own times would spend their last
    step at σ near 0.
    """
    import diffusers

    last = None
    if grid == "own" and steps > 1:
        last = shift / steps / (1 + (shift - 1) / steps)
    return diffusers.FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=schedule.config["num_train_timesteps"],
        shift=shift,
        shift_terminal=last,  # pyright: ignore[reportArgumentType]
        stochastic_sampling=renoise,
    )


def student(
    teacher: Teacher,
    steps: int = 1,
    start: float | None = None,
    renoise: Renoise = True,
    adapter: Adapter | None = None,
    exported: bool = False,
) -> Generator:
    """A trainable few-step student that starts as the teacher, in a stock form.

    Args:
        steps, start, renoise, exported: As `form` has them.
        adapter: Train an adapter of this shape on the teacher's frozen weights; None trains a copy.

    Raises:
        UserError: no stock scheduler samples such a student.
    """
    return student_in(form(source_of(teacher), steps, start, renoise, exported), teacher, adapter)


def renoised_in_part(student: Generator, gamma: float) -> Generator:
    """The student, in place, in the form of the TCD scheduler with this γ.

    It has the times of the LCM scheduler, and no boundary: its network is read as the teacher's is.

    Raises:
        UserError: it does not renoise, or its noise has no DDPM indices.
    """
    network = unwrap(student.denoiser)
    if not student.renoise or not isinstance(network.process, Tabulated):
        raise UserError(
            "student.gamma: only students that renoise, of teachers with DDPM's noise, have it; "
            "remove it"
        )
    predicts: Any = network.schedule.predicts
    network.adopt(replace(network.schedule, predicts=predicts.keywords["own"]))
    student.gamma = gamma
    return student


def source_of(teacher: Teacher) -> Pretrained:
    """The network that a student is a copy of.

    Raises:
        UserError: no stock pipeline could load or decode such a student.
    """
    try:
        source = unwrap(teacher.denoiser)
    except UserError as error:
        raise UserError(f"student: {error}") from None
    if isinstance(teacher.codec, Latents) and teacher.codec.vae is None:
        raise UserError(
            "teacher.vae: the student's pipeline decodes EDM2's latents; give their AutoencoderKL "
            "(stabilityai/sd-vae-ft-mse, or its folder)"
        )
    return source


def student_in(made: SchedulerForm, teacher: Teacher, adapter: Adapter | None = None) -> Generator:
    """A trainable student in this scheduler form; as `student`.

    Raises:
        UserError: the teacher's weights are quantised, and there is no adapter that suits them.
    """
    source = source_of(teacher)
    if is_quantised(source.backbone) and (adapter is None or adapter.kind == "dora"):
        raise UserError(
            "student: quantised weights need an adapter that is not DoRA; set adapters.kind to lora"
        )
    if adapter is not None:
        match_time(source, made.schedule)
        view = with_schedule(source, made.schedule)
        return made.generator(AdaptedDenoiser(view, "student", adapter.config(source.LORA)))
    # trained weights are kept in float32, whatever the teacher's precision is
    backbone: Any = to_float32(deepcopy(source.backbone)).requires_grad_(True)
    trim(backbone, teacher)
    if changes_time_units(source, made.schedule):
        retime(backbone, source.time, made.schedule.time)
    return made.generator(source.twin(backbone, made.schedule))


def changes_time_units(network: Pretrained, schedule: Schedule) -> bool:
    """Whether the student's scheduler gives an EDM UNet2DModel its time in other units."""
    own = network.schedule
    karras = isinstance(own.process, Karras)
    return karras and _is_unet2d(network) and own.name != CM and schedule is not own


def _is_unet2d(network: Pretrained) -> bool:
    """Whether the network is a UNet2DModel, and not one of EDM's with its own source."""
    from diffusers import UNet2DModel

    return isinstance(network.backbone, UNet2DModel)


def match_time(source: Pretrained, schedule: Schedule) -> None:
    """Convert an EDM teacher to its student's time units, since they share that layer."""
    if changes_time_units(source, schedule):
        retime(source.backbone, source.time, schedule.time)
        source.adopt(replace(source.schedule, time=schedule.time, name=CM))


def trim(backbone: Any, teacher: Teacher) -> None:
    """Remove the null class and the learned variance of a student's UNet2DModel, in place."""
    from diffusers import UNet2DModel

    if isinstance(backbone, UNet2DModel):
        drop_null(backbone, teacher)
        drop_variance(backbone)


def cm_levels(steps: int) -> int:
    """The CM scheduler's grid size: a multiple of `steps`, so that all counts share its times."""
    return steps * -(-CM_LEVELS // steps)


def lcm_levels(process: Tabulated) -> int:
    """The LCM scheduler's grid size: its default, or the number of indices if that is smaller."""
    return min(LCM_LEVELS, process.last + 1)


def retime(backbone: Any, old: Time, new: Time) -> None:
    """Convert a UNet2DModel to other time units, in place, with nearly the same outputs.

    Both units are smooth functions of log σ, so ridge regression in float64 refits the first layer
    of the time embedding to the new units' slow sinusoids; the fast ones get weight zero.
    """
    t = torch.linspace(0, 1, 4096, dtype=torch.float64)
    first = backbone.time_embedding.linear_1
    device = first.weight.device
    before = backbone.time_proj(old(t).to(device)).double()
    after = backbone.time_proj(new(t).to(device)).double()
    target = before @ first.weight.double().T + first.bias.double()
    variation = after.diff(dim=0).abs().sum(0)  # 4 for each full period
    slow = variation < 24
    basis = torch.cat([after[:, slow], torch.ones(len(t), 1, dtype=t.dtype, device=device)], 1)
    ridge = 1e-12 * len(t) * torch.eye(basis.shape[1], dtype=t.dtype, device=device)
    solution = torch.linalg.solve(basis.T @ basis + ridge, basis.T @ target)
    with torch.no_grad():
        first.weight.zero_()
        first.weight[:, slow] = solution[:-1].T.to(first.weight.dtype)
        first.bias.copy_(solution[-1])


def drop_variance(backbone: Any) -> None:
    """Remove a learned variance from the network's output: few-step schedulers read none."""
    channels, last = backbone.config["in_channels"], backbone.conv_out
    if last.out_channels == 2 * channels:
        cut = nn.Conv2d(last.in_channels, channels, last.kernel_size, padding=last.padding)
        cut.weight = nn.Parameter(last.weight[:channels].detach().clone())
        cut.bias = nn.Parameter(last.bias[:channels].detach().clone())
        backbone.conv_out = cut
        backbone.register_to_config(out_channels=channels)


def drop_null(backbone: Any, teacher: Teacher) -> None:
    """Remove the null class: students are unguided, and pipelines draw random labels."""
    null: int | None = teacher.codec.null_label  # pyright: ignore[reportAttributeAccessIssue]
    if null is None or backbone.class_embedding is None:
        return
    table = backbone.class_embedding
    if null == table.num_embeddings - 1:
        kept = nn.Parameter(table.weight[:null].detach().clone())
        backbone.class_embedding = nn.Embedding(null, table.embedding_dim, _weight=kept)
        backbone.register_to_config(num_class_embeds=null)


def check_read_times(generator: Generator) -> None:
    """Refuse steps at which the student's network reads another time than stock pipelines pass it.

    Raises:
        UserError: a step is inside an interval of shared times.
    """
    network = unwrap(generator.denoiser)
    t = torch.tensor([v for k in generator.counts for v in generator.grids[k]], dtype=torch.float64)
    shared = (network.read_time(t) - t).abs() > 1e-6
    if shared.any():
        assert network.share_times is not None
        raise UserError(
            f"student.share_times: a step is at t = {t[shared].max():.4g}, where the network reads "
            "an earlier time, and stock pipelines pass it the step's own; set below to at most "
            f"{t[shared].min():.3g}, or train fewer steps"
        )


def scheduler(generator: Generator) -> Any:
    """The diffusers scheduler that samples this student.

    Raises:
        UserError: it renoises in part (CTM's γ), which no scheduler of diffusers does; or a step is
            at a time that its network does not read.
    """
    import diffusers

    check_read_times(generator)

    if generator.renoises_in_part:
        raise UserError(
            f"student.renoise: {float(generator.renoise):g}: no scheduler of diffusers renoises in "
            "part; sample it in Python, or set it to true or false"
        )
    network = unwrap(generator.denoiser)
    schedule, steps = network.schedule, len(generator.times)
    if isinstance(process := schedule.process, Karras):
        assert schedule.sigma_data is not None
        ends = torch.tensor(generator.times, dtype=torch.float64)[[0, -1]]
        sigma_max, sigma_min = process.scales(ends)[1].tolist()
        own = {"sigma_min": sigma_min, "sigma_max": sigma_max, "sigma_data": schedule.sigma_data,
               "rho": process.rho}  # fmt: skip
        if generator.renoise == "posterior":  # the SDE's first order has the same mean and noise
            return diffusers.EDMDPMSolverMultistepScheduler(
                algorithm_type="sde-dpmsolver++", solver_order=1, **own
            )
        if not generator.renoise:
            return diffusers.EDMEulerScheduler(**own)
        return diffusers.CMStochasticIterativeScheduler(
            num_train_timesteps=cm_levels(steps),
            sigma_min=process.sigma_min,
            sigma_max=sigma_max,
            sigma_data=schedule.sigma_data,
            rho=process.rho,
            clip_denoised=False,
        )
    if isinstance(process, Linear):
        flow = flow_scheduler(schedule, process.shift, steps, bool(generator.renoise), network.GRID)
        return network.stock_scheduler(flow)
    assert isinstance(process, Tabulated)
    shared = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
              "prediction_type", "rescale_betas_zero_snr")  # fmt: skip
    config = {k: v for k, v in schedule.config.items() if k in shared}
    if generator.renoise:
        kind = diffusers.LCMScheduler if generator.gamma is None else diffusers.TCDScheduler
        return kind.from_config(
            config, original_inference_steps=lcm_levels(process), clip_sample=False,
            thresholding=False, timestep_scaling=LCM_SCALE, steps_offset=1,
        )  # fmt: skip
    return diffusers.DDIMScheduler.from_config(
        config, timestep_spacing="trailing", clip_sample=False, thresholding=False,
        set_alpha_to_one=True, steps_offset=1,
    )  # fmt: skip
