"""Diffusers' UNet2DModel pipelines, unconditional or class-conditional, read as denoisers.

What the network predicts, its process and its time units come from the scheduler's config:

| scheduler | process | predicts | time fed to the network |
|---|---|---|---|
| any with alphas_cumprod (DDPM, DDIM, …) | Tabulated | prediction_type | index, 0 to N - 1 |
| EDMEuler, EDMDPMSolverMultistep | Karras | EDM | ¼ log σ |
| CMStochasticIterative | Karras | EDM with the σ_min boundary | 250 log σ |
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from teachers.denoiser import Cond, Network, Prediction, edm
from teachers.errors import UserError, nearest
from teachers.process import Karras, Process, Tabulated
from teachers.teacher import Pixels, Teacher, read_json

PIPELINES = ("ConsistencyModelPipeline", "DDIMPipeline", "DDPMPipeline", "PNDMPipeline")
CM = "CMStochasticIterativeScheduler"
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
PREDICTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}

Time = Callable[[Tensor], Tensor]  # the process's t (B,) -> the time that the network reads (B,)


class UNet(Network):
    """A UNet2DModel as a denoiser.

    Args:
        time: From the process's t to the network's own time.
        sigma_data: For EDM networks, whose input is x_t / √(σ² + σ_data²); None feeds x_t as it is.
        scheduler: The diffusers scheduler class and config it was loaded with.
    """

    def __init__(
        self,
        backbone: nn.Module,
        process: Process,
        predicts: str | Prediction,
        time: Time,
        sigma_data: float | None = None,
        scheduler: tuple[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(backbone, process, predicts)
        self.time, self.sigma_data, self.scheduler = time, sigma_data, scheduler

    def call(self, x_t: Tensor, t: Tensor, cond: Cond, s: Tensor | None) -> Tensor:
        if self.sigma_data is not None:
            _, sigma = self.process.at(t, x_t)
            x_t = x_t / (sigma**2 + self.sigma_data**2).sqrt()
        labels = None if cond is None else cond["class_labels"]
        out = self.backbone(x_t, self.time(t), class_labels=labels, return_dict=False)[0]
        return out[:, : x_t.shape[1]]  # a learned variance, where there is one, comes after


def log_sigma(process: Karras, scale: float) -> Time:
    """scale · log σ(t): EDM's time at ¼, a consistency model's at 250."""
    return lambda t: scale * process.scales(t.double())[1].log().to(t.dtype)


def load(folder: Path, source: str, null_label: int | None = None) -> Teacher:
    """A UNet2D pipeline folder as a teacher.

    Raises:
        UserError: a file is missing or damaged, or the scheduler is of a kind not in the table.
    """
    who = f"teacher {source!r}"
    backbone = backbone_of(inside(folder, "unet"), who)
    config = read_json(inside(folder, "scheduler") / "scheduler_config.json", who)
    config = {k: v for k, v in config.items() if not k.startswith("_diffusers")}
    name = str(config.pop("_class_name", ""))
    denoiser = denoiser_of(backbone, name, config, who)
    classes = backbone.config["num_class_embeds"] or 0
    if null_label is not None:
        if not 0 <= null_label < classes:
            raise UserError(f"{who}: null_label {null_label} is outside its {classes} classes")
        if null_label == classes - 1:
            classes -= 1  # the null class is not one to ask for
    size = backbone.config["sample_size"]
    if not isinstance(size, int):
        raise UserError(f"{who}: sample_size is {size!r}; stock pipelines sample one square size")
    shape = (backbone.config["in_channels"], size, size)
    return Teacher(denoiser, Pixels(classes, null_label), shape, source)


def inside(folder: Path, part: str) -> Path:
    """Where a part of a pipeline lies: its own subfolder, or the pipeline's, as in old ones."""
    return folder / part if (folder / part).is_dir() else folder


def backbone_of(folder: Path, who: str) -> Any:
    """The UNet2DModel in `folder`, from safetensors only."""
    from diffusers import UNet2DModel

    config = read_json(folder / "config.json", who)
    if (kind := config.get("_class_name")) != "UNet2DModel":
        raise UserError(f"{who}: {folder / 'config.json'} holds a {kind}; expected a UNet2DModel")
    if (embed := config.get("class_embed_type")) is not None:
        raise UserError(
            f"{who}: class_embed_type {embed!r} is not supported; only class labels are"
        )
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{who}: no safetensors weights in {folder}; pickled weights are never loaded, "
            "convert them with diffusers' save_pretrained first"
        )
    try:
        return UNet2DModel.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    except Exception as error:  # diffusers wraps a damaged file in various types
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{who}: the weights in {folder} cannot be read ({reason})") from None


def denoiser_of(backbone: Any, name: str, config: dict[str, Any], who: str) -> UNet:
    """The backbone read as its scheduler's config says."""
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None:
        raise UserError(f"{who}: scheduler {name!r} is unknown: {nearest(name, [CM, *EDM])}")
    try:
        scheduler = kind.from_config(config)
        full = dict(scheduler.config)
        bar = getattr(scheduler, "alphas_cumprod", None)
    except Exception as error:  # diffusers checks little, and late
        raise UserError(f"{who}: the scheduler's config cannot be read ({error})") from None
    if name == CM or name in EDM:
        low, high = full["sigma_min"], full["sigma_max"]
        if not (isinstance(low, float | int) and isinstance(high, float | int) and 0 < low < high):
            raise UserError(f"{who}: sigma_min and sigma_max are {low!r}, {high!r}; 0 < min < max")
        process = Karras(low, high, full["rho"])
        floor, scale = (full["sigma_min"], 250.0) if name == CM else (0.0, 0.25)
        if full.get("prediction_type", "epsilon") != "epsilon":
            raise UserError(f"{who}: EDM prediction_type must be 'epsilon', the F of EDM's paper")
        predicts = edm(full["sigma_data"], floor)
        time = log_sigma(process, scale)
        return UNet(backbone, process, predicts, time, full["sigma_data"], (name, full))
    if bar is None:
        raise UserError(f"{who}: scheduler {name} is not supported: {nearest(name, [CM, *EDM])}")
    kind = full.get("prediction_type", "epsilon")
    if len(bar) != full["num_train_timesteps"]:
        raise UserError(
            f"{who}: {len(bar)} betas for {full['num_train_timesteps']} num_train_timesteps"
        )
    if kind == "epsilon" and bar[-1] < 1e-10:
        raise UserError(f"{who}: its last index is pure noise, from which ε says nothing of x")
    if not isinstance(kind, str) or kind not in PREDICTS:
        raise UserError(f"{who}: prediction_type {kind!r}: {nearest(str(kind), PREDICTS)}")
    process = Tabulated(bar)
    return UNet(backbone, process, PREDICTS[kind], process.index, None, (name, full))
