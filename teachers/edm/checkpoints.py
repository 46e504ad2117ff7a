"""EDM and EDM2 networks on disk: published pickles, and folders made by `distill convert`.

| in the pickle | in the folder |
|---|---|
| class, init_args, init_kwargs | config.json: `_class_name`, `network`, `arguments` |
| parameters and buffers | model.safetensors, by our networks' own names |
| EDM2's encoder | config.json: `latents`, a scale and a bias per channel |

A folder may hold a diffusers AutoencoderKL as `vae/`, for EDM2's latents.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from teachers.edm import adm, edm2, networks, pickles
from teachers.edm.checks import NETWORKS, check, check_latents
from teachers.edm.latents import PIPELINE, Latents
from teachers.edm.model import EDM, EDMModel
from teachers.edm.names import renamed
from teachers.errors import UserError, clipped, nearest, teacher_at
from teachers.families import unet
from teachers.families.unet import UNet
from teachers.process import Karras
from teachers.storage import components, download
from teachers.storage.diffusers_config import Shift, log_sigma, read
from teachers.storage.files import home, read_json, save_tensors
from teachers.teacher import Pixels, Teacher

WEIGHTS = "model.safetensors"
# Pickled class names, and the argument that names the inner network.
PICKLED = {"EDMPrecond": "EDMPrecond", "Precond": "EDM2Precond"}
# Pickled arguments that are not needed here: redundant, for training only, or use_fp16.
DROPPED = {"augment_dim", "label_dropout", "logvar_channels", "sigma_data", "model_type"}
DROPPED |= {"sigma_min", "sigma_max", "use_fp16"}
# EDM2's statistics of its VAE's latents (arXiv:2312.02696, appendix B), for pickles without them.
MEAN, STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)


class Files(NamedTuple):
    """The config and weights of a network on disk."""

    config: dict[str, Any]
    weights: dict[str, Tensor]


def recognises(path: Path) -> bool:
    """Whether the path is an EDM pickle or a converted folder."""
    if path.suffix == ".pkl":
        return True
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("_class_name") in NETWORKS


def load(path: Path, source: str, null_label: int | None = None, vae: str | None = None) -> Teacher:
    """Load an EDM or EDM2 network as a teacher, from a pickle or a converted folder.

    Args:
        null_label: The null label: only label_dim, a row of zeros, is possible. Networks trained
            with label dropout have it by default.
        vae: A diffusers AutoencoderKL for latent EDM2, its folder or Hub id. Without it, and
            without a `vae` folder beside the weights, the codec takes and returns latents.

    Raises:
        UserError: the files are missing, damaged or refused, or an option does not fit them.
    """
    who = teacher_at(source)
    files = unpickle(path) if path.suffix == ".pkl" else open_folder(path, who)
    config, arguments = files.config, files.config["arguments"]
    classes = arguments.get("label_dim", 0)
    null = classes if classes and config.get("label_dropout") else None
    if null_label is not None:
        if not classes or null_label != classes:
            raise UserError(f"{who}: null_label {null_label}: {no_label(classes)}; leave it out")
        null = classes
    denoiser = denoiser_of(files, who, null is not None)
    size, channels = arguments["img_resolution"], arguments["img_channels"]
    codec = Pixels(classes, null)
    if latents := config.get("latents"):
        if vae is None and (path / "vae").is_dir():
            vae = str(path / "vae")
        loaded = None if vae is None else autoencoder(vae_folder(vae, who), channels, who)
        codec = Latents(classes, null, latents["scale"], latents["bias"], loaded)
        denoiser.per_latent = codec.factor
    elif vae is not None:
        raise UserError(f"{who}: vae: this network works on pixels; remove it")
    return Teacher(denoiser, codec, (channels, size, size), source)


def no_label(classes: int) -> str:
    return f"only {classes}, a row of zeros, stands for none" if classes else "it has no classes"


def convert(source: Path, out: Path) -> None:
    """Convert a published pickle to a folder of safetensors and JSON, without executing it.

    Raises:
        UserError: the pickle is damaged or refused, or `out` exists.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: it already exists; give a new folder")
    files = unpickle(source)
    denoiser_of(files, str(source))  # refuse before writing what `load` would refuse
    draft = out.parent / f".{out.name}.draft"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        weights = {k: v.contiguous().clone() for k, v in files.weights.items()}
        save_tensors(weights, draft / WEIGHTS, {"format": "pt"})
        (draft / "config.json").write_text(
            json.dumps(files.config, indent=2) + "\n", encoding="utf-8"
        )
        if out.exists():
            out.rmdir()
        draft.rename(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def unpickle(path: Path) -> Files:
    """The network of a published pickle, with tensors under our names."""
    content = pickles.read(path)
    network = content.get("ema") if isinstance(content, dict) else content
    if not isinstance(network, pickles.Record):
        raise UserError(f"{path}: holds no network named 'ema'; give an EDM or EDM2 pickle")
    if network.kind not in PICKLED:
        raise UserError(f"{path}: {network.kind[:60]} is not supported; {nearest('', PICKLED)}")
    kind = PICKLED[network.kind]
    state = network.state or {}
    given, unnamed = state.get("_init_kwargs"), state.get("_init_args")
    if type(given) is not dict or unnamed not in ((), []):
        raise UserError(f"{path}: init_kwargs is missing; give an EDM or EDM2 pickle")
    given = json_of(given, str(path))
    default = "UNet" if kind == "EDM2Precond" else "DhariwalUNet"
    arguments = {k: v for k, v in given.items() if k not in DROPPED}
    config = {
        "_class_name": kind,
        "network": given.get("model_type", default),
        "sigma_data": given.get("sigma_data", 0.5),
        "label_dropout": given.get("label_dropout", 0),
        "arguments": arguments,
    }
    if kind == "EDM2Precond":
        config["logvar_channels"] = given.get("logvar_channels", 128)
        config["latents"] = latents_of(content, arguments.get("img_channels"), str(path))
    check(config, str(path))
    weights = tensors(network, str(path))
    if kind == "EDM2Precond":
        weights = round_gains(weights)
    return Files(config, renamed(weights, config))


def tensors(module: pickles.Record, where: str) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled network, under state-dict names.

    Raises:
        UserError: it is not a network, or its modules are shared or nested too deeply.
    """
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    waiting = [("", module, 0)]
    while waiting:
        prefix, here, depth = waiting.pop()
        if id(here) in seen or depth > 32:
            raise UserError(
                f"{where}: module {prefix[:-1]!r} is shared or nested without end; "
                "give EDM's own file"
            )
        seen.add(id(here))
        state = here.state or {}
        parts: list[Any] = [state.get(k) for k in ("_parameters", "_buffers", "_modules")]
        if any(type(p) is not dict for p in parts):
            raise UserError(f"{where}: {prefix[:-1] or 'what it holds'!r} is no network's module")
        for name, value in (parts[0] | parts[1]).items():
            if isinstance(value, Tensor):
                weights[prefix + name] = value
            elif value is not None:
                raise UserError(f"{where}: {prefix + name!r} is not a tensor")
        for name, child in parts[2].items():
            if isinstance(child, pickles.Record):
                waiting.append((f"{prefix}{name}.", child, depth + 1))
            elif child is not None:
                raise UserError(f"{where}: {prefix + name!r} is not a module")
    return weights


def json_of(value: Any, who: str, depth: int = 0) -> Any:
    """A pickled value as JSON data."""
    if depth < 4 and isinstance(value, dict):
        return {k: json_of(v, who, depth + 1) for k, v in value.items()}
    if depth < 4 and isinstance(value, list | tuple):
        return [json_of(v, who, depth + 1) for v in value]
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else str(value)  # sigma_max is infinite by default
    raise UserError(f"{who}: init_kwargs hold a {type(value).__name__}; expected plain data")


def latents_of(content: Any, channels: Any, who: str) -> dict[str, list[float]] | None:
    """EDM2's scale and bias of VAE latents; None for networks on pixels."""
    encoder = content.get("encoder") if isinstance(content, dict) else None
    if encoder is None and channels != 4:
        return None
    if encoder is None:
        return {
            "scale": [0.5 / std for std in STD],
            "bias": [-0.5 * mean / std for mean, std in zip(MEAN, STD)],
        }
    if isinstance(encoder, pickles.Record) and encoder.kind == "StandardRGBEncoder":
        return None
    if not isinstance(encoder, pickles.Record) or encoder.kind != "StabilityVAEEncoder":
        raise UserError(f"{who}: its encoder is neither StandardRGBEncoder nor StabilityVAEEncoder")
    arrays = {k: (encoder.state or {}).get(k) for k in ("scale", "bias")}
    for name, array in arrays.items():
        if not isinstance(array, pickles.Array) or array.state is None:
            raise UserError(f"{who}: its encoder has no {name}")
    return {k: v.state.tolist() for k, v in arrays.items()}  # pyright: ignore


def round_gains(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """EDM2's gains with the rounding of its code, where they are stored in half precision.

    Its code rounds g/√n, the scale of a weight with n inputs, once more. Ours computes it in
    float32; this returns the g that gives the same scale.
    """
    rounded = dict(weights)
    for name, gain in weights.items():
        if gain.dtype == torch.float16 and name.endswith(("emb_gain", "out_gain")):
            user = name.replace("emb_gain", "emb_linear").replace("out_gain", "out_conv")
            if (weight := weights.get(f"{user}.weight")) is not None and weight.numel():
                root = math.sqrt(weight[0].numel())
                rounded[name] = (gain / root).float() * root
    return rounded


def open_folder(folder: Path, who: str) -> Files:
    """Read a folder that `convert` wrote."""
    config = read_json(folder / "config.json", who)
    check(config, who)
    return Files(config, open_weights(folder / WEIGHTS, who, "convert the pickle again"))


def open_weights(path: Path, who: str, remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; `remedy` ends the message if it is missing."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{who}: {path} is missing; {remedy}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{who}: {path} cannot be read ({error}); convert it again") from None


def denoiser_of(files: Files, who: str, null: bool = False) -> UNet:
    """The network as a denoiser: float32 weights, EDM's process and preconditioning.

    Args:
        null: Whether the null label will be used.
    """
    config, name = files.config, files.config["network"]
    karras = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": float(config["sigma_data"])}
    schedule = read("EDMEulerScheduler", karras, who)
    if name == "DhariwalUNet" and (stock := adm.config(config["arguments"], null)):
        with torch.device("meta"):
            network = networks.DhariwalUNet(**config["arguments"])
        fill(network, files.weights, who)
        return UNet(adm.stock(network, stock), schedule)
    with torch.device("meta"):  # compare shapes before allocating
        backbone = EDMModel(**model_config(name, config["arguments"]))
    assert isinstance(schedule.process, Karras)
    schedule = replace(schedule, time=log_sigma(schedule.process, 250.0))
    head = {k: v for k, v in files.weights.items() if k.startswith("uncertainty.")}
    fill(backbone.network, {k: v for k, v in files.weights.items() if k not in head}, who)
    uncertainty = None
    if head:
        channels = config.get("logvar_channels")
        if type(channels) is not int or not 1 <= channels <= 2**16:
            raise UserError(f"{who}: logvar_channels is {channels!r}; expected a number")
        with torch.device("meta"):
            uncertainty = edm2.Uncertainty(channels)
        fill(uncertainty, {k.removeprefix("uncertainty."): v for k, v in head.items()}, who)
    return EDM(backbone, schedule, uncertainty)


def model_config(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The EDMModel config of a network."""
    return {
        "kind": kind,
        "arguments": arguments,
        "sample_size": arguments["img_resolution"],
        "in_channels": arguments["img_channels"],
        "num_class_embeds": arguments.get("label_dim") or None,
    }


def model_of(folder: Path, config: dict[str, Any], who: str) -> EDMModel:
    """Load an exported student's EDMModel with this package's code, not the folder's.

    Raises:
        UserError: its config or weights are damaged.
    """
    network, arguments = config.get("kind"), config.get("arguments")
    kind = "EDM2Precond" if network == "UNet" else "EDMPrecond"
    made = {"_class_name": kind, "network": network, "arguments": arguments, "sigma_data": 0.5}
    check(made, who)
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = open_weights(file, who, "export the run again")
    with torch.device("meta"):
        model = EDMModel(**model_config(str(network), made["arguments"]))
    fill(model, weights, who)
    return model


def load_student(
    folder: Path, source: str, null_label: int | None = None, shift: Shift | None = None
) -> Teacher:
    """Load an exported student of latents, with this package's code and not the folder's.

    Args:
        null_label, shift: As `unet.load` has them.

    Raises:
        UserError: a file is missing or damaged.
    """
    who = teacher_at(source)
    teacher = unet.load({"EDMModel": network}, folder, source, null_label, shift)
    latents: Any = read_json(folder / "model_index.json", who).get("latents")
    check_latents(latents, teacher.shape[0], who)
    vae = autoencoder(folder / "vae", teacher.shape[0], who)
    classes, null = teacher.codec.classes, teacher.codec.null_label
    codec = Latents(classes, null, latents["scale"], latents["bias"], vae)
    denoiser: Any = teacher.denoiser
    denoiser.per_latent = codec.factor
    return replace(teacher, codec=codec)


def is_student(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline folder holds a student of latents."""
    return index.get("_class_name") == PIPELINE


def network(folder: Path, config: dict[str, Any], who: str) -> tuple[type[UNet], EDMModel]:
    """An exported student's network, for `unet.load`."""
    return EDM, model_of(folder, config, who)


def fill(network: nn.Module, weights: dict[str, Tensor], who: str) -> None:
    """Load weights into a network on the meta device; names and shapes must match."""
    expected = network.state_dict()
    if missing := sorted(expected.keys() - weights.keys()):
        raise UserError(f"{who}: the weights lack {missing[0]!r}; correct the config's arguments")
    if extra := sorted(weights.keys() - expected.keys()):
        raise UserError(
            f"{who}: the weights hold {extra[0][:80]!r}, which the network does not have; "
            "correct config.json"
        )
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{who}: {name!r} is {list(weights[name].shape)}; "
                f"the arguments make it {list(tensor.shape)}"
            )
        if not weights[name].is_floating_point():
            raise UserError(f"{who}: {name!r} holds {weights[name].dtype}, not floating point")
    copies = {k: weights[k].to(torch.float32, copy=True).contiguous() for k in expected}
    network.load_state_dict(copies, assign=True)


def vae_folder(source: str, who: str) -> Path:
    """The folder of an autoencoder: a path, or a Hub id, which is downloaded once.

    Raises:
        UserError: there is none.
    """
    path = home(source, f"{who}: vae")
    if path.is_dir():
        return path
    if path.is_absolute() or source.count("/") != 1:
        raise UserError(f"{who}: vae: {clipped(source)} is no folder; give one, a file or a Hub id")
    return download.fetch(source)


def autoencoder(folder: Path, channels: int, who: str) -> Any:
    """Load a diffusers AutoencoderKL from safetensors."""
    from diffusers import AutoencoderKL

    config = read_json(folder / "config.json", who)
    if (kind := config.get("_class_name")) != "AutoencoderKL":
        raise UserError(f"{who}: vae: {folder} holds a {kind}; expected an AutoencoderKL")
    vae = components.module(AutoencoderKL, folder, f"{who}: vae", low_cpu_mem_usage=False)
    if (has := config.get("latent_channels")) != channels:
        raise UserError(f"{who}: vae: {has} latent channels; the network has {channels}")
    return vae.eval().requires_grad_(False)
