"""Train the emoji teacher on a GPU for a given time, and assemble it as a pipeline.

python benchmarks/emoji_teacher.py tokens emoji.npz tokens.npz     # caption variants as token ids
python benchmarks/emoji_teacher.py train emoji.npz tokens.npz OUT --seconds 500 --tail 45
python benchmarks/emoji_teacher.py assemble emoji.npz OUT TEACHER  # a StableDiffusionPipeline

`train` needs only torch, diffusers, transformers, safetensors and Pillow. Within --seconds it
trains an AutoencoderKL (64 pixels to latents of 16 x 16 x 8), two networks that read concept and
style, a UNet with a CLIP text encoder on latents (arXiv:2112.10752) that predicts v
(arXiv:2202.00512), and last a small UNet with a text encoder of its own that learns the large
one's predictions: these are what ships. The learning rates follow the clock. Meanwhile another
process compiles the UNets into the cache of kernels; until it has, they train as they are.
Weights are written as they come: the averages in half precision as files of at most 15 MiB in
OUT, and the full state in --state, from which the next call with the same --state goes on.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

import argparse  # noqa: E402
import copy  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import random  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import traceback  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), "emoji-inductor")))
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import cross_entropy, l1_loss, mse_loss  # noqa: E402

from eval.emoji.grid import Grid, draw, load, still  # noqa: E402
from eval.emoji.networks import ConvNeXt, Reader, ResNet  # noqa: E402
from eval.emoji.train import RATES, SEEN, judged, spoil  # noqa: E402

LENGTH = 24  # tokens of a caption
VARIANTS = 6  # caption variants of a cell: plain, four with tags, one without style
SHARD = 15 * 2**20  # bytes
VAE = {
    "sample_size": 64,
    "latent_channels": 8,
    "block_out_channels": [32, 48, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 16,
    "mid_block_add_attention": False,
    "scaling_factor": 1.0,
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "projection_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
}
UNET = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": [192, 224],
    "layers_per_block": [1, 2],
    "down_block_types": ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    "attention_head_dim": [3, 7],  # numbers of heads, as in Stable Diffusion's configurations
    "cross_attention_dim": 128,
    "norm_num_groups": 32,
}
SMALL = {
    **UNET,
    "block_out_channels": [96, 96],
    "layers_per_block": 1,
    "attention_head_dim": [3, 3],
}
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
TINY = {
    "vae": {"block_out_channels": [16, 16, 16]},
    "unet": {"block_out_channels": [32, 32], "attention_head_dim": [2, 2]},
    "small": {"block_out_channels": [32, 32], "attention_head_dim": [2, 2]},
}


def elapsed() -> float:
    """Seconds since the process began."""
    return time.monotonic() - BEGAN


def say(text: str) -> None:
    print(f"[{elapsed():6.1f} s] {text}", flush=True)  # noqa: T201


# --------------------------------------------------------------------------------- captions


def words_of(grid: Grid) -> set[str]:
    """The tokenizer's words: of styles, of labels, and of tags of at least four concepts."""
    texts = ["style", *grid.styles, *(c.label for c in grid.concepts)]
    words = {word for text in texts for word in text.replace(",", " ").split()}
    tags = Counter(w for c in grid.concepts for w in {w for t in c.tags for w in t.split()})
    return words | {word for word, n in tags.items() if n >= 4}


def tokenizer_of(grid: Grid) -> Any:
    from distill.pretrain.tokenizer import clip_tokenizer

    return clip_tokenizer(sorted(words_of(grid)), LENGTH)


def variants(grid: Grid, index: int, words: set[str], rng: random.Random) -> list[str]:
    """Caption variants of a picture: plain, four with tags in random order, and the label only."""
    concept = grid.concepts[int(grid.concept[index])]
    plain, texts = grid.caption(index), []
    known = [tag for tag in concept.tags if set(tag.split()) <= words]
    for n in (1, 1, 2, 3):
        tags = rng.sample(known, min(n, len(known)))
        texts.append(", ".join([plain, *tags]))
    return [plain, *texts, concept.label]


def write_tokens(grid: Grid, path: Path) -> None:
    """Write token ids (N, VARIANTS, LENGTH) of all captions, those of "", and special tokens."""
    tokenizer, words, rng = tokenizer_of(grid), words_of(grid), random.Random(0)
    texts = [variants(grid, i, words, rng) for i in range(len(grid.concept))]
    flat = [text for group in texts for text in group]
    ids = tokenizer(flat, padding="max_length", max_length=LENGTH, truncation=True).input_ids
    empty = tokenizer([""], padding="max_length", max_length=LENGTH).input_ids
    lengths = [len(tokenizer(group[0]).input_ids) for group in texts]
    say(f"{len(tokenizer)} tokens; the longest plain caption has {max(lengths)}")
    facts = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    np.savez_compressed(
        path,
        ids=np.array(ids, np.int16).reshape(len(texts), VARIANTS, LENGTH),
        empty=np.array(empty[0], np.int16),
        facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
    )


# --------------------------------------------------------------------------------- networks


def make(facts: dict[str, Any], tiny: bool) -> tuple[Any, Any, Any, Any, Any]:
    """An autoencoder, a text encoder, a UNet, a small UNet and its text encoder, untrained."""
    import diffusers
    import transformers

    changes: dict[str, Any] = TINY if tiny else {"vae": {}, "unet": {}, "small": {}}
    vae: Any = diffusers.AutoencoderKL(**{**VAE, **changes["vae"]})
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, **facts))
    unet = diffusers.UNet2DConditionModel(**{**UNET, **changes["unet"]})
    small = diffusers.UNet2DConditionModel(**{**SMALL, **changes["small"]})
    with torch.no_grad():  # the latents' noise starts small, or it would hide their means
        vae.quant_conv.bias[VAE["latent_channels"] :] = -6.0
    return vae, text, unet, small, copy.deepcopy(text)


def count(*networks: nn.Module) -> float:
    """Parameters in millions."""
    return sum(p.numel() for network in networks for p in network.parameters()) / 1e6


class Run:
    """What all stages share: the device, the data, the clock and the log."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.steps, self.small_steps = args, 0, 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.half = torch.bfloat16
        self.log: dict[str, Any] = {"args": {k: str(v) for k, v in vars(args).items()}}
        self.log["configs"] = {
            "vae": VAE,
            "text_encoder": TEXT,
            "unet": UNET,
            "small": SMALL,
            "scheduler": SCHEDULER,
        }
        self.log["torch"] = torch.__version__
        if self.device.type == "cuda":
            self.log["device"] = torch.cuda.get_device_name()
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.allow_tf32 = True
        torch.manual_seed(args.seed)
        self.grid = load(args.data).to(self.device)
        with np.load(args.tokens) as file:
            self.facts = json.loads(file["facts"].tobytes().decode())
            self.ids = torch.from_numpy(file["ids"]).long().to(self.device)
            self.empty = torch.from_numpy(file["empty"]).long().to(self.device)
        self.train = (~self.grid.held_out).nonzero()[:, 0]
        self.held = self.grid.held_out.nonzero()[:, 0]
        networks = make(self.facts, args.tiny)
        self.vae, self.text, self.unet, self.small, self.small_text = (
            n.to(self.device) for n in networks
        )
        sizes = len(self.grid.concepts), len(self.grid.styles)
        self.known: dict[str, Tensor] = {}  # see distances()
        self.centres: dict[str, Tensor] = {}
        self.readers: dict[str, Reader] = {
            "a": ResNet(*sizes).to(self.device),
            "b": ConvNeXt(*sizes).to(self.device),
        }
        self.vae, self.unet, self.small = (
            n.to(memory_format=torch.channels_last) for n in (self.vae, self.unet, self.small)
        )
        self.unet.train()
        self.small.train()
        self.text.train()
        self.small_text.train()

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, self.half)

    def pictures(self, index: Tensor) -> Tensor:
        """Fresh draws of pictures, in channels_last."""
        x = draw(self.grid.pictures[index], self.grid.mirrors[index])
        return x.contiguous(memory_format=torch.channels_last)

    def batch(self, index: Tensor, size: int) -> Tensor:
        """A random choice from `index`."""
        return index[torch.randint(len(index), (size,), device=self.device)]

    def note(self, stage: str, **values: Any) -> None:
        values = {k: round(float(torch.as_tensor(v).detach()), 5) for k, v in values.items()}
        self.log.setdefault("history", []).append(
            {"stage": stage, "s": round(elapsed(), 1), **values}
        )
        say(f"{stage} " + " ".join(f"{k}={v:.4g}" for k, v in values.items()))


def attempt(run: Run, stage: Callable[..., None], *args: Any, **options: Any) -> None:
    """Run a stage that the teacher can do without; its error goes to the log."""
    try:
        stage(run, *args, **options)
    except Exception:
        run.log.setdefault("errors", []).append(traceback.format_exc()[-1500:])
        say(f"{stage.__name__} failed: {run.log['errors'][-1]}")


class Trainer:
    """AdamW with an average of the weights and a learning rate that follows the clock.

    Args:
        end: When the stage ends, in seconds of the process.
    """

    def __init__(
        self, networks: list[nn.Module], lr: float, end: float, decay: float, warmup: int = 100,
        wd: float = 0.01,
    ) -> None:  # fmt: skip
        self.params: list[Any] = [p for network in networks for p in network.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.params, lr, (0.9, 0.99), weight_decay=wd, fused=self.params[0].is_cuda
        )
        self.mean = [p.detach().clone() for p in self.params]
        self.lr, self.began, self.end, self.decay, self.warmup = lr, elapsed(), end, decay, warmup
        self.steps = 0

    @property
    def fraction(self) -> float:
        """The share of the stage's time that has passed."""
        return min((elapsed() - self.began) / max(self.end - self.began, 1e-6), 1.0)

    def step(self, loss: Tensor) -> Tensor:
        """One update; returns the norm of the gradients."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.params, 1.0)
        flat = 0.3  # the share of time at the full rate, before a cosine to zero
        x = max(self.fraction - flat, 0) / (1 - flat)
        warmup = min((self.steps + 1) / self.warmup, 1)
        rate = self.lr * warmup * (0.5 + 0.5 * math.cos(math.pi * x))
        for group in self.optimizer.param_groups:
            group["lr"] = max(rate, 1e-3 * self.lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.mean, self.params, 1 - decay)
        return norm

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        """Set the weights and their average, and clear the optimizer's state."""
        for p, mean, value in zip(self.params, self.mean, values, strict=True):
            p.copy_(value)
            mean.copy_(value)
        self.optimizer.state.clear()


# --------------------------------------------------------------------------------- stages


def edges(x: Tensor) -> Tensor:
    """Differences of neighbouring pixels, right and below."""
    return torch.cat([x.diff(dim=2).flatten(1), x.diff(dim=3).flatten(1)], 1)


def vae_stage(run: Run, end: float) -> None:
    """Train the autoencoder on absolute and squared errors of pixels and of their differences."""
    vae, size = run.vae, run.args.vae_batch
    vae.train()
    trainer = Trainer([vae], 2e-3, end, 0.995)
    while elapsed() < end:
        x = run.pictures(run.batch(run.train, size))
        with run.autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = (mean**2 + logvar.exp() - 1 - logvar).mean() / 2
        error = mse_loss(y, x)
        loss = error + 0.5 * l1_loss(y, x) + 0.5 * l1_loss(edges(y), edges(x)) + 5e-4 * kl
        norm = trainer.step(loss)
        if trainer.steps % run.args.every == 1:
            run.note("vae", step=trainer.steps, loss=loss, mse=error, kl=kl, norm=norm)
    with torch.no_grad():
        for p, mean in zip(trainer.params, trainer.mean):
            p.copy_(mean)
    vae.eval().requires_grad_(False)
    whiten(run)
    x = run.pictures(run.held[:256])
    error = mse_loss(decode(run, encode(run, x)).clamp(-1, 1), x)
    run.log["vae"] = {
        "steps": trainer.steps,
        "pictures": trainer.steps * size,
        "parameters_m": count(vae),
        "held_out_psnr_db": float(10 * torch.log10(4 / error)),
    }
    say(f"vae {run.log['vae']}")


@torch.no_grad()
def whiten(run: Run) -> None:
    """Give latents mean 0 and variance 1 in each channel, inside the autoencoder's 1x1 layers."""
    vae, n = run.vae, VAE["latent_channels"]
    parts = [encode(run, run.pictures(part)) for part in run.train[::2].split(500)]
    z = torch.cat(parts).float()
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    after = vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[:, None, None]
    before = vae.quant_conv
    before.bias[:n] = (before.bias[:n] - mean) / std
    before.weight[:n] /= std[:, None, None, None]
    before.bias[n:] -= 2 * std.log()


@torch.no_grad()
def encode(run: Run, x: Tensor) -> Tensor:
    """Latents (N, 8, 16, 16): means of the posteriors."""
    with run.autocast():
        return run.vae.encode(x).latent_dist.mean.float()


@torch.no_grad()
def decode(run: Run, z: Tensor) -> Tensor:
    """Pictures of latents."""
    with run.autocast():
        return torch.cat([run.vae.decode(part).sample.float() for part in z.split(512)])


def reader_stage(run: Run, name: str, end: float) -> None:
    """Train a network that reads concept and style.

    It sees the training cells only, and all cells in the last 40 % of the time; its figures on
    held-out cells that it has not seen are taken before. So it is a ruler for models that never
    saw them, as the readers of `eval.emoji.train` are.
    """
    network = run.readers[name].to(memory_format=torch.channels_last)
    network.train()
    every = torch.arange(len(run.grid.concept), device=run.device)
    trainer = Trainer([network], RATES[name], end, 0.99, 200, 0.05)
    facts: dict[str, Any] = {"parameters_m": count(network)}
    while elapsed() < end:
        late = trainer.fraction > SEEN
        if late and "held_out_cells_unseen" not in facts:
            exchange(run, trainer)
            facts["held_out_cells_unseen"] = read(run, network, run.held)
            exchange(run, trainer)
            network.train()
        index = run.batch(every if late else run.train, run.args.reader_batch)
        with run.autocast():
            concept, style = network(spoil(run.pictures(index)))
        loss = cross_entropy(concept.float(), run.grid.concept[index], label_smoothing=0.1)
        loss = loss + 0.5 * cross_entropy(style.float(), run.grid.style[index])
        trainer.step(loss)
        if trainer.steps % run.args.every == 1:
            run.note(f"reader {name}", step=trainer.steps, loss=loss)
    with torch.no_grad():
        for p, mean in zip(trainer.params, trainer.mean):
            p.copy_(mean)
    facts["held_out_cells"] = read(run, network, run.held)
    facts["train_cells"] = read(run, network, run.train[::4])
    for kind, index in (("held_out", run.held), ("train", run.train[::4])):
        x = decode(run, encode(run, run.pictures(index))).clamp(-1, 1)
        facts[f"{kind}_cells_through_the_autoencoder"] = read(run, network, index, x)
    facts |= {"steps": trainer.steps, "pictures": trainer.steps * run.args.reader_batch}
    run.log[f"reader_{name}"] = facts
    say(f"reader {name} {facts}")


@torch.no_grad()
def read(run: Run, network: Reader, index: Tensor, x: Tensor | None = None) -> dict[str, float]:
    """Accuracies on draws of pictures, or on pictures `x` for these cells."""
    network.eval()
    x = run.pictures(index) if x is None else x
    with run.autocast():
        facts = judged(network, x, run.grid.concept[index], run.grid.style[index])
        styles = torch.cat([network(part)[1].float() for part in x.split(250)]).argmax(1)
    for n, style in enumerate(run.grid.styles):
        own = run.grid.style[index] == n
        facts[f"style_{style}"] = (styles[own] == n).double().mean().item()
    return facts


class Latents:
    """Latents of several draws of each training picture, of which some are replaced each step."""

    def __init__(self, run: Run, draws: int) -> None:
        self.run = run
        self.cell = run.train.repeat(draws)
        parts = [encode(run, run.pictures(part)).half() for part in self.cell.split(1000)]
        self.z = torch.cat(parts).contiguous(memory_format=torch.channels_last)

    def take(self, size: int, fresh: int) -> tuple[Tensor, Tensor]:
        """Random latents (size, 8, 16, 16), and the indices of their cells; renews `fresh`."""
        if fresh:
            old = torch.randint(len(self.z), (fresh,), device=self.z.device)
            self.z[old] = encode(self.run, self.run.pictures(self.cell[old])).half()
        row = torch.randint(len(self.z), (size,), device=self.z.device)
        return self.z[row].float(), self.cell[row]


def alphas(device: torch.device) -> tuple[Tensor, Tensor]:
    """α and σ of every time of the scheduler."""
    from diffusers import DDIMScheduler

    bar = DDIMScheduler(**SCHEDULER).alphas_cumprod.to(device)
    return bar.sqrt(), (1 - bar).sqrt()


def times(n: int, device: torch.device) -> Tensor:
    """Times: half uniform, half logit-normal around the middle."""
    u = torch.rand(n, device=device)
    middle = torch.sigmoid(torch.randn(n, device=device))
    u = torch.where(torch.rand(n, device=device) < 0.5, u, middle)
    return (1000 * u).long().clamp(0, 999)


def caption_ids(run: Run, cell: Tensor) -> Tensor:
    """Token ids: 70 % plain, 14 % with tags, 4 % without style, 12 % empty."""
    n, u = len(cell), torch.rand(len(cell), device=run.device)
    tagged = torch.randint(1, VARIANTS - 1, (n,), device=run.device)
    kind = torch.where(u < 0.14, tagged, torch.where(u < 0.18, VARIANTS - 1, 0))
    ids = run.ids[cell, kind]
    return torch.where((u > 0.88)[:, None], run.empty, ids)


def noised(run: Run, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents with noise at random times, the times, and the v of this noise."""
    t, noise = times(len(x), x.device), torch.randn_like(x)
    a, s = alpha[t][:, None, None, None], sigma[t][:, None, None, None]
    x_t = (a * x + s * noise).contiguous(memory_format=torch.channels_last)
    return x_t, t, a * noise - s * x


def denoising_loss(
    run: Run, network: Any, x: Tensor, ids: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Squared error of v at random times."""
    x_t, t, target = noised(run, x, alpha, sigma)
    with run.autocast():
        v = network(x_t, t, run.text(ids)[0], return_dict=False)[0]
    return mse_loss(v.float(), target)


def imitation_loss(
    run: Run, networks: tuple[Any, Any], x: Tensor, ids: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Squared distance of the small UNet's v to the large one's, at random times."""
    large, small = networks
    x_t, t, _ = noised(run, x, alpha, sigma)
    with run.autocast(), torch.no_grad():
        text = run.text(ids)[0].clone()
        target = large(x_t, t, text, return_dict=False)[0].float()
    with run.autocast():
        v = small(x_t, t, run.small_text(ids)[0], return_dict=False)[0]
    return mse_loss(v.float(), target.clone())


def clear(*networks: nn.Module) -> None:
    """Drop the gradients."""
    for network in networks:
        for p in network.parameters():
            p.grad = None


def tried(run: Run, network: nn.Module, loss: Callable[[Any], Tensor]) -> Any:
    """The network compiled and run once forward and back; the plain network if that fails."""
    if not run.args.compile:
        return network
    try:
        fast = torch.compile(network, dynamic=False)
        loss(fast).backward()
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        return fast
    except Exception:
        run.log["compile_error"] = traceback.format_exc()[-1500:]
        say("compilation failed; the network runs as it is\n" + run.log["compile_error"])
        return network
    finally:
        clear(run.unet, run.text, run.small, run.small_text)


def blank(run: Run, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch of noise without captions, and α and σ of all times."""
    x = torch.randn(size, 8, 16, 16, device=run.device)
    x = x.contiguous(memory_format=torch.channels_last)
    return x, run.empty.expand(size, -1), *alphas(run.device)


def compiled(run: Run) -> Any:
    """The large UNet, compiled for its own training."""
    return tried(run, run.unet, lambda f: denoising_loss(run, f, *blank(run, run.args.batch)))


def compiled_pair(run: Run) -> tuple[Any, Any]:
    """The large UNet and the small one, compiled for the imitation; only the small one learns."""
    run.unet.requires_grad_(False)
    run.text.requires_grad_(False)
    batch = blank(run, run.args.small_batch)
    large = torch.compile(run.unet, dynamic=False) if run.args.compile else run.unet
    small = tried(run, run.small, lambda f: imitation_loss(run, (large, f), *batch))
    return (run.unet if small is run.small else large), small


class Compiling:
    """A network, or the compiled one as soon as a helper has filled the cache of kernels.

    Args:
        mark: The file in --state that the helper writes when it has.
        compile: Gives the compiled network, within seconds by the cache.
        end: When the stage ends; near it, compiling is not worth its time.
    """

    def __init__(
        self, run: Run, mark: str, plain: Any, compile: Callable[[], Any], end: float
    ) -> None:
        self.run, self.mark, self.network = run, run.args.state / mark, plain
        self.compile, self.end = compile, end
        self.done, self.calls = not run.args.compile, -1

    def __call__(self) -> Any:
        self.calls += 1
        if not self.done and self.calls % 20 == 0 and self.mark.exists():
            self.done = True
            if self.end - elapsed() > 40:
                began = elapsed()
                self.network = self.compile()
                say(f"{self.mark.name}: compiled from the cache in {elapsed() - began:.1f} s")
        return self.network


def unet_stage(run: Run, latents: Latents, end: float) -> None:
    """Train the UNet and the text encoder on latents; write weights at 50 and 100 %."""
    args, began = run.args, elapsed()
    pick = Compiling(run, "warm", run.unet, lambda: compiled(run), end)
    sizes = [f"{count(n):.1f} M" for n in (run.unet, run.text)]
    say(f"UNet of {sizes[0]} parameters, text encoder of {sizes[1]}: ready")
    trainer = Trainer([run.unet, run.text], args.lr, end, 0.998, 200)
    alpha, sigma = alphas(run.device)

    def loss() -> Tensor:
        x, cell = latents.take(args.batch, args.fresh)
        return denoising_loss(run, pick(), x, caption_ids(run, cell), alpha, sigma)

    until(run, trainer, "unet", loss, args.batch, end, began)


def small_stage(run: Run, latents: Latents, end: float, copied: bool) -> None:
    """Train the small UNet on the large one's predictions, with a text encoder of its own.

    That is a copy of the large one's, and learns on.
    """
    args, began = run.args, elapsed()
    if copied:
        run.small_text.load_state_dict(run.text.state_dict())
    run.unet.requires_grad_(False)
    run.text.requires_grad_(False)
    plain = (run.unet, run.small)
    pick = Compiling(run, "warm-pair", plain, lambda: compiled_pair(run), end)
    say(f"small UNet of {count(run.small):.1f} M parameters: ready")
    trainer = Trainer([run.small, run.small_text], args.small_lr, end, 0.998, 200)
    alpha, sigma = alphas(run.device)

    def loss() -> Tensor:
        x, cell = latents.take(args.small_batch, args.fresh)
        return imitation_loss(run, pick(), x, caption_ids(run, cell), alpha, sigma)

    until(run, trainer, "small", loss, args.small_batch, end, began)


def until(
    run: Run, trainer: Trainer, name: str, loss: Callable[[], Tensor], size: int, end: float,
    began: float,
) -> None:  # fmt: skip
    """Train until the time `end`; goes back to good weights if the loss is not finite."""
    good, since, halfway = None, elapsed(), False
    while elapsed() < end:
        error = loss()
        norm = trainer.step(error)
        if trainer.steps % run.args.every == 1:
            value = error.item()
            if not math.isfinite(value):
                if good is None:
                    raise SystemExit("the loss is not finite; lower the rate")
                trainer.restore(good)
                trainer.lr *= 0.5
                say("the loss is not finite: back to the last good weights, at half the rate")
            else:
                good = [m.clone() for m in trainer.mean]
            rate = size * (run.args.every if trainer.steps > 1 else 1) / (elapsed() - since)
            since = elapsed()
            run.note(name, step=trainer.steps, loss=value, norm=norm, per_s=rate)
        if not halfway and trainer.fraction >= 0.5:
            halfway = True
            keep(run, trainer, name, size, began)
            exchange(run, trainer)
            since = elapsed()
    keep(run, trainer, name, size, began)


def keep(run: Run, trainer: Trainer, name: str, size: int, began: float) -> None:
    """Put the averages into the networks, write them, and leave them there.

    The networks have no dropout, and stay in training mode: a change would compile them again.
    """
    exchange(run, trainer)
    pictures = trainer.steps * size
    run.log[name] = {
        "steps": trainer.steps,
        "pictures": pictures,
        "epochs": pictures / len(run.train),
        "seconds": elapsed() - began,
        "parameters_m": count(run.unet if name == "unet" else run.small),
        "text_parameters_m": count(run.text),
    }
    if name == "unet":
        run.steps += trainer.steps
    else:
        run.small_steps += trainer.steps
    write(run)
    say(f"weights written: {name} {run.log[name]}")


@torch.no_grad()
def exchange(run: Run, trainer: Trainer) -> None:
    """Swap the weights and their averages; a second call swaps them back."""
    values = [p.detach().clone() for p in trainer.params]
    for p, mean, value in zip(trainer.params, trainer.mean, values, strict=True):
        p.copy_(mean)
        mean.copy_(value)


# --------------------------------------------------------------------------------- files


def parts(run: Run) -> dict[str, nn.Module]:
    small = {"small": run.small, "small_text": run.small_text}
    return {"vae": run.vae, **small, **run.readers, "text": run.text, "unet": run.unet}


def write(run: Run) -> None:
    """Write all weights in half precision to OUT, and in full to --state; each file whole."""
    out, args = run.args.out, run.args
    flat = {
        f"{name}.{key}": value
        for name, network in parts(run).items()
        for key, value in network.state_dict().items()
    }
    flat["steps"] = torch.tensor(run.steps)
    flat["small_steps"] = torch.tensor(run.small_steps)
    try:
        args.state.mkdir(parents=True, exist_ok=True)
        draft = args.state / "draft"
        save_file({k: v.detach().cpu().contiguous() for k, v in flat.items()}, draft)
        draft.replace(args.state / "weights.safetensors")
    except OSError as error:
        say(f"state not written: {error}")
    half = {
        k: v.detach().to("cpu", torch.float16 if v.is_floating_point() else v.dtype).contiguous()
        for k, v in flat.items()
    }
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for key, value in half.items():
        if not args.large and key.startswith(("unet.", "text.")):
            continue
        size = 2 * value.numel() + 200
        if used + size > SHARD:
            shards.append({})
            used = 0
        shards[-1][key] = value
        used += size
    for n, shard in enumerate(shards):
        save_file(shard, out / f".{n}.draft")
    for n in range(len(shards)):
        (out / f".{n}.draft").replace(out / f"weights-{n}.safetensors")
    write_log(run)


def write_log(run: Run) -> None:
    """Write the log to OUT and to --state."""
    run.log["seconds"] = elapsed()
    for folder in (run.args.out, run.args.state):
        draft = folder / ".log"
        draft.write_text(json.dumps(run.log, indent=1))
        draft.replace(folder / "log.json")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights that a run wrote."""
    flat: dict[str, Tensor] = {}
    for path in sorted(folder.glob("weights*.safetensors")):
        flat |= load_file(path)
    return flat


def restore(network: nn.Module, flat: dict[str, Tensor], name: str) -> None:
    """Load the part `name` of a run's weights."""
    own = network.state_dict()
    state = {k: flat[f"{name}.{k}"].to(v.dtype) for k, v in own.items()}
    network.load_state_dict(state)


# --------------------------------------------------------------------------------- pictures


@torch.no_grad()
def sample(run: Run, unet: Any, ids: Tensor, guidance: float, seed: int, steps: int = 25) -> Tensor:
    """Pictures (N, 3, 64, 64) in [-1, 1] of captions, with stock DDIM."""
    encoder = run.small_text if unet is run.small else run.text
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps, device=run.device)
    rng = torch.Generator(run.device).manual_seed(seed)
    z = torch.randn(len(ids), 8, 16, 16, device=run.device, generator=rng)
    outs = []
    for part, words in zip(z.split(1024), ids.split(1024)):
        with run.autocast():
            text = encoder(words)[0]
            null = encoder(run.empty[None])[0].expand(len(words), -1, -1)
        for t in scheduler.timesteps:
            with run.autocast():
                v = unet(part, t, text, return_dict=False)[0].float()
                if guidance != 1:
                    free = unet(part, t, null, return_dict=False)[0].float()
                    v = free + guidance * (v - free)
            part = scheduler.step(v, t, part).prev_sample
        outs.append(decode(run, part))
    return torch.cat(outs).clamp(-1, 1)


def page(rows: list[Tensor], path: Path) -> None:
    """Write rows of pictures (each (N, 3, 64, 64)) as a PNG."""
    width = max(len(row) for row in rows)
    sheet = torch.full((len(rows), width, 3, 66, 66), 225, dtype=torch.uint8)
    for i, row in enumerate(rows):
        sheet[i, : len(row), :, 1:-1, 1:-1] = ((row + 1) * 127.5).round().to("cpu", torch.uint8)
    sheet = sheet.permute(0, 3, 1, 4, 2).reshape(len(rows) * 66, width * 66, 3)
    Image.fromarray(sheet.numpy()).save(path, quality=88)


def sheet_rows(run: Run, unet: Any) -> list[Tensor]:
    """Concepts in every style, then held-out cells under their real pictures, then seeds."""
    rng = torch.Generator().manual_seed(7)
    full = [
        i for i in range(len(run.grid.concepts)) if (run.grid.concept[run.train] == i).sum() >= 5
    ]
    chosen = [full[k] for k in torch.randperm(len(full), generator=rng)[:24]]
    rows: list[Tensor] = []  # ids of rows to sample, or pictures
    for style in range(len(run.grid.styles)):
        cells = [
            ((run.grid.concept == i) & (run.grid.style == style)).nonzero()[0, 0] for i in chosen
        ]
        rows.append(run.ids[torch.stack(cells), 0])
    held = run.held[torch.randperm(len(run.held), generator=rng).to(run.device)]
    for cells in held[: 4 * len(chosen)].split(len(chosen)):
        rows += [still(run.grid.pictures[cells]), run.ids[cells, 0]]
    some = [cells[len(cells) * k // 3] for cells in (run.train, run.held) for k in (1, 2)]
    for cell in some:  # the same prompt from other noise
        rows.append(run.ids[cell, 0].expand(len(chosen), -1))
    wanted = [row for row in rows if row.dtype == torch.long]
    sizes = [len(row) for row in wanted]
    sampled = iter(sample(run, unet, torch.cat(wanted), 3.0, 1).split(sizes))
    return [next(sampled) if row.dtype == torch.long else row for row in rows]


def contact(run: Run, path: Path) -> None:
    """A sheet: of the small UNet, the same of the large one, and the small one in fewer steps."""
    rows = sheet_rows(run, run.small)
    page(rows, path)
    ids = run.ids[run.train[:: len(run.train) // 24][:24], 0]
    pairs = ((25, 3.0), (8, 3.0), (4, 3.0), (2, 3.0), (1, 3.0), (25, 1.0), (4, 1.0), (1, 1.0))
    rows += [sample(run, run.small, ids, guidance, 2, steps) for steps, guidance in pairs]
    page(rows + sheet_rows(run, run.unet), path)
    say(f"sheet {path}")


@torch.no_grad()
def distances(run: Run, x: Tensor) -> dict[str, float]:
    """Mean distances of pictures to the nearest training picture or its mirror image.

    In pixels (root mean square at 32 x 32), and in the cosine of each reader's features.
    """

    def spaces(pictures: Tensor) -> dict[str, Tensor]:
        small = nn.functional.avg_pool2d(pictures, 2).flatten(1)
        parts = {"pixels": small / small.shape[1] ** 0.5}
        for key, network in run.readers.items():
            f = torch.cat([network.eval().features(part).float() for part in pictures.split(500)])
            parts[f"reader_{key}"] = nn.functional.normalize(f - run.centres[key], dim=1)
        return parts

    exact = "donot_use_mm_for_euclid_dist"
    if not run.known:
        real = still(run.grid.pictures[run.train])
        for key, network in run.readers.items():
            f = torch.cat([network.eval().features(part).float() for part in real.split(500)])
            run.centres[key] = f.mean(0)
        mirrored = real[run.grid.mirrors[run.train]].flip(3)
        run.known = spaces(torch.cat([real, mirrored]))
    return {
        key: torch.cdist(f, run.known[key], compute_mode=exact).amin(1).double().mean().item()
        for key, f in spaces(x).items()
    }


def measure(run: Run, end: float) -> None:
    """Accuracies and distances of samples of train and held-out cells, while time is left."""
    rng = torch.Generator().manual_seed(3)
    some = run.train[torch.randperm(len(run.train), generator=rng)[:600].to(run.device)]
    kinds = {"train": some, "held_out": run.held}
    networks = {"small": run.small, "unet": run.unet}
    run.log["real"] = {}
    for kind, cells in kinds.items():
        x = run.pictures(cells)
        line = {key: read(run, network, cells, x) for key, network in run.readers.items()}
        run.log["real"][kind] = {**line, "distances": distances(run, x)}
        say(f"real {kind}: {json.dumps(rounded(run.log['real'][kind]))}")
    first = (("small", 25, 3.0), ("unet", 25, 3.0), ("small", 25, 5.0), ("small", 25, 1.0))
    rest = [("small", n, g) for n in (8, 4, 2, 1) for g in (3.0, 1.0)]
    last = [("unet", 25, 1.0), ("unet", 25, 5.0), ("small", 25, 2.0), ("small", 25, 7.0),
            *(("unet", n, g) for n in (8, 4, 2, 1) for g in (3.0, 1.0))]  # fmt: skip
    for name, steps, guidance in (*first, *rest, *last):
        if elapsed() > end:
            break
        ids = run.ids[torch.cat([some, run.held]), 0]
        x = sample(run, networks[name], ids, guidance, 5, steps)
        line = {"network": name, "steps": steps, "guidance": guidance}
        for kind, images in (("train", x[: len(some)]), ("held_out", x[len(some) :])):
            for key, network in run.readers.items():
                line[f"{kind}_{key}"] = read(run, network, kinds[kind], images)
            line[f"{kind}_distances"] = distances(run, images)
        run.log.setdefault("samples", []).append(line)
        write_log(run)
        say(f"samples {json.dumps(rounded(line))}")


def rounded(tree: Any) -> Any:
    """A tree of numbers with three digits after the point."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    return round(tree, 3) if isinstance(tree, float) else tree


# --------------------------------------------------------------------------------- commands


def warm(args: argparse.Namespace) -> None:
    """Compile the UNet into the cache of kernels, for another process."""
    run = Run(args)
    args.state.mkdir(parents=True, exist_ok=True)
    for mark, compile in (("warm", compiled), ("warm-pair", compiled_pair)):
        if (args.state / mark).exists() or (mark == "warm" and args.unet_share == 0):
            continue
        compile(run)
        if "compile_error" in run.log:
            say(f"{mark}: failed")
            return
        (args.state / mark).touch()
        say(f"{mark}: compiled")


def train(args: argparse.Namespace) -> None:
    for folder in (args.out, args.state):
        folder.mkdir(parents=True, exist_ok=True)
    state = args.state if (args.state / "weights.safetensors").exists() else args.resume
    helper = None
    if not state:
        for mark in ("warm", "warm-pair"):
            (args.state / mark).unlink(missing_ok=True)
    if args.compile and not all((args.state / mark).exists() for mark in ("warm", "warm-pair")):
        command = [sys.executable, *sys.argv]
        command[command.index("train")] = "warm"
        helper = subprocess.Popen(command)
    run = Run(args)
    sizes = f"{len(run.train)} training cells, {len(run.held)} held out"
    say(f"{sizes}, on {run.log.get('device', 'cpu')}")
    total, tail = args.seconds, min(args.tail, 0.1 * args.seconds)
    if state:
        flat = read_weights(state)
        for name, network in parts(run).items():
            restore(network, flat, name)
        run.vae.eval().requires_grad_(False)
        run.steps, run.small_steps = int(flat["steps"]), int(flat.get("small_steps", 0))
        run.log["resumed_at_steps"] = [run.steps, run.small_steps]
        args.lr *= 0.6 if run.steps else 1
        args.small_lr *= 0.6 if run.small_steps else 1
        rates = f"{args.lr:.1e} and {args.small_lr:.1e}"
        say(f"goes on from {state}, steps {run.steps} and {run.small_steps}, at rates of {rates}")
    else:
        vae_stage(run, args.vae_share * total)
        for name in run.readers:
            attempt(run, reader_stage, name, elapsed() + args.reader_share / 2 * total)
        write(run)
    latents = Latents(run, args.draws)
    say(f"{len(latents.z)} latents; their standard deviation is {latents.z.float().std():.3f}")
    last = total - tail
    if args.unet_share > 0:
        unet_stage(run, latents, elapsed() + args.unet_share * (last - elapsed()))
    attempt(run, small_stage, latents, last, run.small_steps == 0)
    if helper:
        helper.kill()
    attempt(run, contact, args.out / "sheets.jpg")
    attempt(run, measure, total)
    write_log(run)
    say("done")


def assemble(args: argparse.Namespace) -> None:
    """Write a run's weights as a StableDiffusionPipeline folder."""
    import diffusers

    from distill.pretrain.text_to_image import make_portable, open_to_readers

    grid, flat = load(args.data), read_weights(args.run)
    tokenizer = tokenizer_of(grid)
    facts = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vae, large_text, large, small, small_text = make(facts, args.tiny)
    unet, text = (large, large_text) if args.large else (small, small_text)
    names = ("unet", "text") if args.large else ("small", "small_text")
    for name, network in (("vae", vae), (names[0], unet), (names[1], text)):
        restore(network, flat, name)
        network.half()
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),  # pyright: ignore[reportArgumentType]
        safety_checker=None, feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(args.teacher)
    load_in_float32(args.teacher / "text_encoder" / "config.json")
    compact(args.teacher / "tokenizer" / "tokenizer.json")
    make_portable(args.teacher)
    open_to_readers(args.teacher)
    readers = {k: v for k, v in flat.items() if k[:2] in ("a.", "b.")}
    save_file(readers, args.teacher.with_name(args.teacher.name + "-readers.safetensors"))


def load_in_float32(path: Path) -> None:
    """Make transformers load a text encoder in float32, as diffusers does the other parts.

    It takes the type from the config, and otherwise the type of the weights, which are halves.
    """
    config = json.loads(path.read_text())
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def compact(path: Path) -> None:
    """Write a JSON file without spaces."""
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree, ensure_ascii=False, separators=(",", ":")) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="The emoji teacher.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("tokens")
    p.add_argument("data", type=Path)
    p.add_argument("tokens", type=Path)
    for name in ("train", "warm"):
        p = commands.add_parser(name)
        p.add_argument("data", type=Path)
        p.add_argument("tokens", type=Path)
        p.add_argument("out", type=Path)
        p.add_argument("--seconds", type=float, default=270)
        p.add_argument("--tail", type=float, default=25, help="seconds for sheets and figures")
        p.add_argument("--vae-share", type=float, default=0.16)
        p.add_argument("--reader-share", type=float, default=0.12)
        p.add_argument("--unet-share", type=float, default=0.5, help="of what is left, the rest "
                       "being the small UNet's")  # fmt: skip
        p.add_argument("--batch", type=int, default=384)
        p.add_argument("--vae-batch", type=int, default=192)
        p.add_argument("--reader-batch", type=int, default=512)
        p.add_argument("--fresh", type=int, default=48, help="latents renewed in each step")
        p.add_argument("--draws", type=int, default=4, help="draws of each picture at first")
        p.add_argument("--small-batch", type=int, default=512)
        p.add_argument("--lr", type=float, default=7e-4)
        p.add_argument("--small-lr", type=float, default=1.2e-3)
        p.add_argument("--every", type=int, default=100, help="steps between lines of the log")
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--state", type=Path, default=Path(tempfile.gettempdir(), "emoji-state"))
        p.add_argument("--resume", type=Path, help="a folder of weights to go on from")
        p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
        p.add_argument("--large", action=argparse.BooleanOptionalAction, default=True,
                       help="write the large UNet to OUT as well")  # fmt: skip
        p.add_argument("--tiny", action="store_true", help="tiny networks, for a test")
    p = commands.add_parser("assemble")
    p.add_argument("data", type=Path)
    p.add_argument("run", type=Path)
    p.add_argument("teacher", type=Path)
    p.add_argument("--large", action="store_true", help="with the large UNet")
    p.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.command == "tokens":
        write_tokens(load(args.data), args.tokens)
    else:
        {"train": train, "warm": warm, "assemble": assemble}[args.command](args)


if __name__ == "__main__":
    main()
