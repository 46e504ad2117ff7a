"""Train a small text-to-image teacher from scratch, saved as a StableDiffusionPipeline folder.

Latent diffusion (Rombach et al. 2022, arXiv:2112.10752) in two stages: first an AutoencoderKL,
then a UNet and a CLIP text encoder together, on cached latents. Some captions are replaced by the
empty prompt, which is unconditional in classifier-free guidance (arXiv:2207.12598). Each stage
resumes exactly from its checkpoint.
"""

from __future__ import annotations

import inspect
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from distill.config.errors import explain
from distill.config.optimizer import OptimizerConfig
from distill.config.schema import Section
from distill.console import Progress
from distill.field_types import Fraction, NonNegative, NonNegativeInt, PositiveInt
from distill.pretrain.tokenizer import clip_tokenizer, tokens
from distill.seeds import seed_all, seed_of
from distill.training import checkpoint
from distill.training.ema import EMA
from distill.training.player import Player
from students.export.portable import make_portable
from teachers.errors import UserError, nearest
from teachers.storage.files import open_to_readers

LARGEST = 10 * 2**20  # bytes of a teacher that is part of the package


class Scenes(NamedTuple):
    """A source of pictures with captions.

    captions: All captions.
    draw: Draws captions with a seed, as uint8 (N, 3, H, W).
    accuracy: Shares of uint8 pictures that show their caption, or a part of it.
    """

    captions: list[str]
    draw: Callable[[Sequence[str], int], Tensor]
    accuracy: Callable[[Tensor, Sequence[str]], dict[str, float]]


class DataSection(Section):
    """Drawn pictures."""

    source: Literal["shapes"]
    each: PositiveInt = 100  # pictures of each caption for training
    held_out: PositiveInt = 4  # pictures of each caption for checking the autoencoder


class VaeStage(Section):
    """Training of the autoencoder: squared error of pixels plus a small KL divergence."""

    steps: PositiveInt  # training steps
    batch: PositiveInt = 32  # pictures of a step
    kl: NonNegative = 1e-4  # weight of the KL divergence, in nats per latent number
    optimizer: OptimizerConfig = OptimizerConfig()


class UnetStage(Section):
    """Training of the denoiser and the text encoder."""

    steps: PositiveInt  # training steps
    batch: PositiveInt = 64  # pictures of a step
    drop: Fraction = 0.1  # share of captions that become the empty prompt
    optimizer: OptimizerConfig = OptimizerConfig()


class Stages(Section):
    """Both stages of training, and what they share."""

    vae: VaeStage
    unet: UnetStage
    ema: Fraction = 0.999  # decay of the weights' average, which is saved; 0 means no average
    seed: NonNegativeInt = 0  # of all random numbers
    log_every: PositiveInt = 50  # steps between lines of metrics.jsonl
    save_every: PositiveInt = 500  # steps between checkpoints


class Measures(Section):
    """Measurements for the card: each guidance at the most steps, and the best at each count."""

    protocol: Literal["shapes"] | None = None  # by default the teacher is not measured
    guidance: tuple[NonNegative, ...] = (1.0, 3.0, 5.0)  # scales; 1 means no guidance
    steps: tuple[PositiveInt, ...] = (1, 2, 4, 8, 25)  # solver steps
    seeds: PositiveInt = 1  # number of seeds that the results are averaged over


class TextRecipe(Section):
    """A text-to-image teacher: the configuration of each part, and the training."""

    data: DataSection
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    unet: dict[str, Any]
    scheduler: dict[str, Any]
    train: Stages
    eval: Measures = Measures()

    @classmethod
    def check(cls, tree: dict[str, Any], where: str) -> TextRecipe:
        """A recipe from a plain tree.

        Raises:
            UserError: one line with the key path and what was expected.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise UserError(f"{where}: {explain(error, cls)}") from None

    def tree(self) -> dict[str, Any]:
        """Plain data that `check` reads as this recipe, with all defaults written out."""
        return self.model_dump(mode="json")


def train(pipe: Any, recipe: TextRecipe, scenes: Scenes, out: Path) -> dict[str, Any]:
    """Train the pipeline, and save it in `out`/teacher.

    Returns:
        For each stage: seconds, steps per second and parameters; for the autoencoder also the share
        of held-out pictures that still show their caption after it.
    """
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UserError(
            "distill teach: a text-to-image teacher trains in one process; start only one"
        )
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.to(accelerator.device)
    cfg, report = recipe.train, {}

    captions = [c for c in scenes.captions for _ in range(recipe.data.each)]
    pictures = scenes.draw(captions, seed_of(cfg.seed, "pictures") % 2**32)
    stage = Stage("vae", [pipe.vae], cfg.vae.optimizer, cfg, cfg.vae.steps, accelerator, out)
    report["vae"] = stage.run(lambda: vae_loss(pipe.vae, pictures, cfg.vae))
    pipe.vae.eval()
    test_captions = [c for c in scenes.captions for _ in range(recipe.data.held_out)]
    unseen = scenes.draw(test_captions, seed_of(cfg.seed, "held out") % 2**32)
    decoded = as_bytes(decode(pipe.vae, encode(pipe.vae, unseen)))
    report["vae"]["held_out"] = {
        "psnr_db": psnr(decoded, unseen),
        **scenes.accuracy(decoded, test_captions),
    }
    latents = encode(pipe.vae, pictures)
    scale = 1 / latents.std().item()  # gives latents of variance 1, as in Stable Diffusion
    pipe.vae.register_to_config(scaling_factor=scale)
    report["vae"]["scaling_factor"] = scale
    latents *= scale

    ids = tokens(pipe.tokenizer, [*scenes.captions, ""]).to(accelerator.device)
    rows = torch.arange(len(scenes.captions)).repeat_interleave(recipe.data.each)
    networks = [pipe.unet, pipe.text_encoder]
    stage = Stage("unet", networks, cfg.unet.optimizer, cfg, cfg.unet.steps, accelerator, out)
    report["unet"] = stage.run(lambda: unet_loss(pipe, latents, rows, ids, cfg.unet))
    save(pipe, out / "teacher")
    return report


class Stage:
    """One stage of training: its networks, their average, and its checkpoint.

    Args:
        name: The stage's name, for its checkpoint, its seeds and its lines in metrics.jsonl.
    """

    def __init__(
        self, name: str, networks: list[nn.Module], config: OptimizerConfig, cfg: Stages,
        steps: int, accelerator: Accelerator, out: Path,
    ) -> None:  # fmt: skip
        self.name, self.networks, self.cfg, self.steps, self.out = name, networks, cfg, steps, out
        params = [p for network in networks for p in network.parameters()]
        self.player = Player(params, accelerator, config, steps)
        self.ema = EMA(params, cfg.ema)
        self.step, self.seconds = 0, 0.0
        self.first: Tensor | None = None  # the loss before any update of this run
        self.folder = out / "checkpoints" / name
        if self.folder.exists():
            state = checkpoint.load(self.folder)
            self.player.load_state_dict(state["player"])
            self.ema.load_state_dict(state["ema"])
            self.step, self.seconds = state["step"], state["seconds"]

    def run(self, loss_of: Callable[[], dict[str, Tensor]]) -> dict[str, Any]:
        """Train to the last step, then replace the weights by their average.

        Args:
            loss_of: Draws a batch and returns its "loss", with other values to log. The random
                numbers depend only on the seed, the stage and the step.
        """
        for network in self.networks:
            network.train()
        cfg, began = self.cfg, time.perf_counter() - self.seconds
        with Progress(self.steps, self.step, True) as progress:
            while self.step < self.steps:
                seed_all(cfg.seed, self.name, self.step)
                with self.player.turn(self.step):
                    logs = loss_of()
                    logs["loss"].backward()
                if self.first is None:
                    self.first = logs["loss"].detach()
                self.ema.update()
                self.step += 1
                if self.step % cfg.log_every == 0 or self.step == self.steps:
                    self.seconds = time.perf_counter() - began
                    self._log(progress, {k: v.item() for k, v in logs.items()})
                if self.step % cfg.save_every == 0 or self.step == self.steps:
                    self._save()
                progress.advance(self.step)
        with torch.no_grad():  # with a decay of 0 there is no average
            for p, mean in zip(self.player.params, self.ema.mean):
                p.copy_(mean)
        for network in self.networks:
            network.eval()
        return {
            "steps": self.step,
            "seconds": self.seconds,
            "steps_per_s": self.step / self.seconds,
            "parameters": sum(p.numel() for p in self.player.params),
        }

    def _log(self, progress: Progress, values: dict[str, float]) -> None:
        if not all(abs(v) < float("inf") for v in values.values()):  # nan fails this too
            fault = f"{self.name}, step {self.step}: the loss is {values['loss']}"
            if self.first is not None and not self.first.isfinite():
                raise UserError(
                    f"{fault}, as it was before any update; no learning rate is the cause: check "
                    "the sections of the networks and the scheduler"
                )
            raise UserError(f"{fault}; lower train.{self.name}.optimizer.lr, or raise its warmup")
        progress.show(self.step, {f"{self.name}/{k}": v for k, v in values.items()})
        line = {"stage": self.name, "step": self.step, "seconds": self.seconds, **values}
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        state = {
            "player": self.player.state_dict(),
            "ema": self.ema.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        checkpoint.save(state, self.folder)


def vae_loss(vae: Any, pictures: Tensor, cfg: VaeStage) -> dict[str, Tensor]:
    """Loss of a random batch of pictures: squared error per pixel, and KL per latent number."""
    x = as_floats(pictures[torch.randint(len(pictures), (cfg.batch,))]).to(vae.device)
    posterior = vae.encode(x).latent_dist
    error = mse_loss(vae.decode(posterior.sample()).sample, x)
    kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
    return {"loss": error + cfg.kl * kl, "error": error.detach(), "kl": kl.detach()}


def unet_loss(
    pipe: Any, latents: Tensor, rows: Tensor, ids: Tensor, cfg: UnetStage
) -> dict[str, Tensor]:
    """Squared error of the scheduler's prediction (noise or velocity), at uniform times.

    Args:
        latents: Scaled latents (N, C, H, W).
        rows: The row of `ids` with the caption of each latent, (N,).
        ids: Token ids (K + 1, L); the last row is the empty prompt.
    """
    scheduler, device = pipe.scheduler, pipe.unet.device
    index = torch.randint(len(latents), (cfg.batch,))
    x = latents[index].to(device)
    dropped = torch.rand(cfg.batch) < cfg.drop
    captions = torch.where(dropped, len(ids) - 1, rows[index]).to(device)
    t = torch.randint(scheduler.config.num_train_timesteps, (cfg.batch,)).to(device)
    noise = torch.randn(x.shape).to(device)
    x_t = scheduler.add_noise(x, noise, t)
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(x, noise, t)
    else:
        target = noise
    text = pipe.text_encoder(ids[captions])[0]
    return {"loss": mse_loss(pipe.unet(x_t, t, text).sample, target)}


def pipeline(recipe: TextRecipe, captions: Sequence[str], where: str) -> Any:
    """An untrained StableDiffusionPipeline with the recipe's configurations.

    Raises:
        UserError: a configuration has an unknown key or an impossible value, or the parts do not
            fit each other.
    """
    import diffusers
    import transformers

    config = dict(recipe.scheduler)
    kind = getattr(diffusers, str(config.pop("class", "")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise UserError(f"{where}: scheduler.class: expected the name of a diffusers scheduler")
    scheduler = part(kind, config, "scheduler", where)
    prediction = scheduler.config.get("prediction_type")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{where}: scheduler.prediction_type: expected epsilon or v_prediction, "
            f"not {prediction!r}"
        )
    known = inspect.signature(transformers.CLIPTextConfig.__init__).parameters
    length = recipe.text_encoder.get(
        "max_position_embeddings", known["max_position_embeddings"].default
    )
    tokenizer = clip_tokenizer(captions, length)
    longest = max(len(ids) for ids in tokenizer(captions).input_ids)
    if longest > length:
        raise UserError(
            f"{where}: text_encoder.max_position_embeddings: {length} is too small; the longest "
            f"caption takes {longest} tokens"
        )
    seed_all(recipe.train.seed, "networks")
    text = part(transformers.CLIPTextConfig, recipe.text_encoder, "text_encoder", where)
    text.vocab_size, text.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    text.bos_token_id, text.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    vae = part(diffusers.AutoencoderKL, recipe.vae, "vae", where)
    start_quiet(vae)
    cross = {"cross_attention_dim": text.hidden_size}
    channels = dict.fromkeys(("in_channels", "out_channels"), vae.config.latent_channels)
    unet = part(diffusers.UNet2DConditionModel, {**cross, **channels, **recipe.unet}, "unet", where)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    side = vae.config.sample_size // pipe.vae_scale_factor
    if side != unet.config.sample_size:
        raise UserError(
            f"{where}: unet.sample_size: {unet.config.sample_size} does not fit; the autoencoder's "
            f"latents of {vae.config.sample_size} pixels have {side}"
        )
    return pipe


@torch.no_grad()
def start_quiet(vae: Any) -> None:
    """Start the latents' noise at a standard deviation of 0.05.

    With 1, the noise would hide the small means of an untrained encoder.
    """
    last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    last.bias[vae.config.latent_channels :] = -6.0


def part(kind: Any, config: dict[str, Any], section: str, where: str) -> Any:
    """An object of class `kind` from its section, with every key checked."""
    known = set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}
    if wrong := [k for k in config if k not in known]:
        raise UserError(f"{where}: {section}.{wrong[0]}: unknown key; {nearest(wrong[0], known)}")
    try:
        return kind(**config)
    except Exception as error:  # diffusers raises many types for a wrong size
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: {section}: {reason}; correct the section") from None


def save(pipe: Any, folder: Path) -> None:
    """Save the pipeline in `folder`, with the UNet's weights in half precision.

    Raises:
        UserError: the folder is larger than the package may carry.
    """
    draft = folder.with_name(f".{folder.name}")
    shutil.rmtree(draft, ignore_errors=True)
    pipe.save_pretrained(draft)
    pipe.unet.half().save_pretrained(draft / "unet")
    pipe.unet.float()
    make_portable(draft)
    open_to_readers(draft)
    size = sum(p.stat().st_size for p in draft.rglob("*") if p.is_file())
    shutil.rmtree(folder, ignore_errors=True)
    draft.replace(folder)
    if size > LARGEST:
        raise UserError(
            f"{folder}: it has {size / 2**20:.1f} MiB, more than {LARGEST >> 20}; make the "
            "networks smaller"
        )


@torch.no_grad()
def samples(pipe: Any, prompts: Sequence[str], seed: int, steps: int, guidance: float) -> Tensor:
    """Pictures of the stock pipeline: float (N, 3, H, W) in [-1, 1]."""
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(seed)
    parts = [
        pipe(
            list(prompts[i : i + 240]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=rng,
            output_type="pt",
        ).images
        for i in range(0, len(prompts), 240)
    ]
    return torch.cat(parts).float().cpu() * 2 - 1


@torch.no_grad()
def encode(vae: Any, pictures: Tensor) -> Tensor:
    """Unscaled latents of uint8 pictures: the means of their posteriors."""
    parts = [vae.encode(as_floats(p).to(vae.device)).latent_dist.mean for p in pictures.split(500)]
    return torch.cat(parts).cpu()


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures in [-1, 1] of unscaled latents."""
    return torch.cat([vae.decode(z.to(vae.device)).sample for z in latents.split(500)]).cpu()


def as_floats(pictures: Tensor) -> Tensor:
    """uint8 pictures as floats in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] as uint8, rounded to the nearest."""
    return (pictures * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of uint8 pictures, in dB."""
    error = (a.float() - b.float()).square().mean()
    return (10 * torch.log10(255**2 / error)).item()
