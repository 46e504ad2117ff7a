"""Students in the forms that stock diffusers pipelines sample exactly.

A student leaves this project as a plain folder, so its parametrisation and its times are chosen
here, before training, to be those of a scheduler that diffusers ships:

| teacher | returns by | scheduler | times |
|---|---|---|---|
| EDM | renoising | CMStochasticIterative | equal steps in σ^(1/ρ), on its 40-level grid |
| DDPM betas | renoising | LCM | equal steps of its 50-index grid |
| DDPM betas | the ODE | DDIM, trailing | equal steps of the index |

All three run in `ConsistencyModelPipeline`, the one that hands labels to a UNet2DModel.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from students.generator import Generator
from teachers.denoiser import edm
from teachers.errors import UserError
from teachers.process import Karras, Tabulated
from teachers.teacher import Teacher
from teachers.unet import CM, Time, UNet, log_sigma

CM_LEVELS = 40  # CMStochasticIterativeScheduler's default, rounded up to a multiple of the steps
LCM_LEVELS = 50  # LCMScheduler's original_inference_steps
LCM_SCALE, LCM_DATA = 10.0, 0.5  # its boundary: c_skip = d² / ((10 i)² + d²) at index i


def student(
    teacher: Teacher, steps: int = 1, start: float | None = None, renoise: bool = True
) -> Generator:
    """A trainable few-step copy of the teacher, in a stock form.

    Args:
        steps: The most steps it is trained for; it also runs in those that divide them.
        start: σ/α of the noise it starts from; the teacher's highest by default.
        renoise: Return to the next time with fresh noise, or along the ODE.

    Raises:
        UserError: no stock scheduler samples such a student.
    """
    source = teacher.denoiser
    if not isinstance(source, UNet):
        kind = type(source).__name__
        raise UserError(f"student: a {kind} teacher has no weights that a pipeline could load")
    if not 1 <= steps <= CM_LEVELS:
        raise UserError(f"student.steps: {steps} is outside 1 to {CM_LEVELS}")
    backbone = deepcopy(source.backbone).requires_grad_(True)
    drop_null(backbone, teacher)
    drop_variance(backbone)
    if isinstance(process := source.process, Karras):
        return _consistency(source, backbone, process, steps, start, renoise)
    if not isinstance(process, Tabulated):
        raise UserError(f"student: no stock scheduler knows a {type(process).__name__} process")
    if start is not None:
        raise UserError("student.start: DDPM students start at their last index; leave it out")
    if not renoise:
        if (process.last + 1) % steps:
            raise UserError(
                f"student.steps: {steps} does not divide the {process.last + 1} indices"
            )
        times = [(round((process.last + 1) * (1 - k / steps)) - 1) for k in range(steps)]
        network = UNet(backbone, process, source.coefficients, process.index)
    else:
        n = lcm_levels(process)
        if steps > n:
            raise UserError(f"student.steps: {steps} is more than the {n} times there are")
        jump = (process.last + 1) // n
        grid = [jump * (i + 1) - 1 for i in reversed(range(n))]
        times = [grid[k * n // steps] for k in range(steps)]
        network = LCM(backbone, process, source.coefficients, process.index)
    network.scheduler = source.scheduler
    return Generator(network, [i / process.last for i in times], renoise, start=1.0)


def _consistency(
    source: UNet,
    backbone: nn.Module,
    process: Karras,
    steps: int,
    start: float | None,
    renoise: bool,
) -> Generator:
    if not renoise:
        raise UserError(
            "student.renoise: stock pipelines sample EDM students by renoising; leave it true"
        )
    first = 1.0
    if start is not None:
        if not process.sigma_min < start <= process.sigma_max:
            raise UserError(
                f"student.start: {start} is outside the teacher's noise levels, "
                f"{process.sigma_min} to {process.sigma_max}"
            )
        first = process.time(torch.tensor(start, dtype=torch.float64)).item()
    assert source.sigma_data is not None
    time = log_sigma(process, 250.0)
    if source.scheduler is None or source.scheduler[0] != CM:
        retime(backbone, source.time, time)
    network = UNet(
        backbone, process, edm(source.sigma_data, process.sigma_min), time, source.sigma_data
    )
    n = levels(steps)
    times = [first * (1 - k * (n // steps) / (n - 1)) for k in range(steps)]
    return Generator(network, times, True, floor=process.sigma_min)


def levels(steps: int) -> int:
    """The CM scheduler's grid size for a student of `steps`: a multiple, so that every count that
    divides them picks a subset of the same times."""
    return steps * -(-CM_LEVELS // steps)


def lcm_levels(process: Tabulated) -> int:
    """The LCM scheduler's grid size: its default, or every index where there are fewer."""
    return min(LCM_LEVELS, process.last + 1)


class LCM(UNet):
    """A DDPM network under latent consistency models' boundary (arXiv:2310.04378): x̂ = x at t = 0.

    The stock scheduler applies it, so the student is trained under it: c_skip x_t + c_out x̂, with
    weights that differ from 0 and 1 only at the lowest few indices.
    """

    def forward(self, x_t: Tensor, t: Tensor, cond=None, s: Tensor | None = None) -> Tensor:
        assert isinstance(self.process, Tabulated)
        scaled = LCM_SCALE * self.process.index(t).view(-1, *(1,) * (x_t.ndim - 1))
        total = scaled**2 + LCM_DATA**2
        x = super().forward(x_t, t, cond, s)
        return LCM_DATA**2 / total * x_t + scaled / total.sqrt() * x


def retime(backbone: Any, old: Time, new: Time) -> None:
    """Make a UNet2DModel read its time in other units, in place, saying what it said before.

    Both are smooth functions of log σ, so the first layer of the time embedding is refitted to the
    new units' slow sinusoids by ridge regression in float64; the fast ones start at weight zero.
    """
    t = torch.linspace(0, 1, 4096, dtype=torch.float64)
    first = backbone.time_embedding.linear_1
    device = first.weight.device
    before = backbone.time_proj(old(t).to(device)).double()
    after = backbone.time_proj(new(t).to(device)).double()
    target = before @ first.weight.double().T + first.bias.double()
    turns = after.diff(dim=0).abs().sum(0)  # total variation: 4 for each full period
    slow = turns < 24
    basis = torch.cat([after[:, slow], torch.ones(len(t), 1, dtype=t.dtype, device=device)], 1)
    ridge = 1e-12 * len(t) * torch.eye(basis.shape[1], dtype=t.dtype, device=device)
    solution = torch.linalg.solve(basis.T @ basis + ridge, basis.T @ target)
    with torch.no_grad():
        first.weight.zero_()
        first.weight[:, slow] = solution[:-1].T.to(first.weight.dtype)
        first.bias.copy_(solution[-1])


def drop_variance(backbone: Any) -> None:
    """Cut a learned variance off the network's output: no few-step scheduler reads one."""
    channels, last = backbone.config["in_channels"], backbone.conv_out
    if last.out_channels == 2 * channels:
        cut = nn.Conv2d(last.in_channels, channels, last.kernel_size, padding=last.padding)
        cut.weight = nn.Parameter(last.weight[:channels].detach().clone())
        cut.bias = nn.Parameter(last.bias[:channels].detach().clone())
        backbone.conv_out = cut
        backbone.register_to_config(out_channels=channels)


def drop_null(backbone: Any, teacher: Teacher) -> None:
    """Forget the null class: a student needs no guidance, and pipelines draw random labels."""
    if teacher.codec.null is None or backbone.class_embedding is None:
        return
    table = backbone.class_embedding
    null = int(teacher.codec.null["class_labels"])
    if null == table.num_embeddings - 1:
        kept = nn.Parameter(table.weight[:null].detach().clone())
        backbone.class_embedding = nn.Embedding(null, table.embedding_dim, _weight=kept)
        backbone.register_to_config(num_class_embeds=null)


def scheduler(generator: Generator) -> Any:
    """The diffusers scheduler that samples this student."""
    import diffusers

    network = generator.denoiser
    assert isinstance(network, UNet)
    if isinstance(process := network.process, Karras):
        assert network.sigma_data is not None
        sigma_max = process.scales(torch.tensor(generator.times[0], dtype=torch.float64))[1].item()
        return diffusers.CMStochasticIterativeScheduler(
            num_train_timesteps=levels(len(generator.times)),
            sigma_min=process.sigma_min,
            sigma_max=sigma_max,
            sigma_data=network.sigma_data,
            rho=process.rho,
            clip_denoised=False,
        )
    assert network.scheduler is not None
    assert isinstance(network.process, Tabulated)
    _, everything = network.scheduler  # the betas and the prediction type stay as they were
    shared = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
              "prediction_type", "rescale_betas_zero_snr")  # fmt: skip
    config = {k: v for k, v in everything.items() if k in shared}
    if generator.renoise:
        return diffusers.LCMScheduler.from_config(
            config, original_inference_steps=lcm_levels(network.process), clip_sample=False,
            thresholding=False, timestep_scaling=LCM_SCALE,
        )  # fmt: skip
    return diffusers.DDIMScheduler.from_config(
        config, timestep_spacing="trailing", clip_sample=False, thresholding=False,
        set_alpha_to_one=True,
    )  # fmt: skip
