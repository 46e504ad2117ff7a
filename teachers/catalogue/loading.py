"""The one function that loads any teacher, and the families that it knows."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from inspect import Signature, signature
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from teachers.catalogue.published import OUTLINES
from teachers.errors import UserError, clipped, nearest, teacher_at
from teachers.storage import single_files
from teachers.storage.files import home, read_json
from teachers.storage.variants import check_asked, reading
from teachers.teacher import EMBEDDED, Pixels, Teacher

SINGLE = {".pt", ".pth", ".safetensors", ".gguf"}  # ends of the files that are a whole network


def load(source: str, **options: Any) -> Teacher:
    """The teacher at `source`, frozen and in eval mode.

    Args:
        source: "digits" or "shapes" (embedded), "analytic:NAME" (closed form), a diffusers folder,
            a Hub id, a published EDM or EDM2 .pkl, the folder that it was converted to, a file of
            SiT's, LightningDiT's or U-ViT's, a single .safetensors file of SD, SDXL, SD3 or
            FLUX, a .gguf file of SD3 or FLUX, or "path/to/file.py:function" for a function that
            returns a Teacher.
        options: Those of the family. UNet2D pipelines: `null_label`, the class that means no class.
            EDM and EDM2: that and `vae`, the AutoencoderKL of their latents. SiT,
            LightningDiT and U-ViT: `vae`, `precision`, `shift`, `interpolant` and `heads`. All
            others: `negative_prompt`, `size` (pixels) and `precision` (fp32, bf16, fp16, fp8, nf4)
            and `adapters` (LoRA files that become part of the weights);
            single files also `config`, a diffusers folder or Hub id of the same family;
            videos also `frames`, and FLUX.1-dev also `embedded_guidance`. Folders and Hub ids:
            `variant`, of the weights of every component that has it.

    Raises:
        UserError: there is no such source, its files are damaged, its family is not supported, or
            the family has no such option.
    """
    _check_adapters(source, options)
    if (variant := options.pop("variant", None)) is not None:
        return _of_variant(source, variant, options)
    if source.startswith("analytic:"):
        if options:
            raise UserError(f"{teacher_at(source)}: it takes no options; leave out {min(options)}")
        return _analytic(source)
    if source.rpartition(":")[0].endswith(".py"):
        if options:
            raise UserError(f"{teacher_at(source)}: it takes no options; leave out {min(options)}")
        return _from_function(source)
    if source == "digits":
        options.setdefault("null_label", 10)
    path = EMBEDDED.get(source) or home(source, "teacher")
    if path.suffix in SINGLE and isfile(path):
        family, loader = file_loader(path, source, options.get("config"))
    else:
        path = path if source.endswith(".pkl") or source in EMBEDDED else find(source)
        family, loader = loader_of(path, source)
    known = [name for name in list(signature(loader).parameters)[2:] if name != "file"]
    if "adapters" in options and "adapters" not in known:
        raise _no_pipeline(source)
    if unknown := sorted(options.keys() - set(known)):
        raise UserError(
            f"{teacher_at(source)}: {family} has no option {clipped(unknown[0])!r}; "
            f"{nearest(unknown[0], known)}"
        )
    teacher = loader(path, source, **options)
    teacher.options = options
    teacher.denoiser.eval().requires_grad_(False)
    return teacher


def _of_variant(source: str, variant: str, options: dict[str, Any]) -> Teacher:
    """The teacher of one variant of a folder's weights.

    Raises:
        UserError: the source has no variants, or no component has this one.
    """
    ends = {*SINGLE, ".pkl"}
    network = source.startswith("analytic:") or source.rpartition(":")[0].endswith(".py")
    if network or source in EMBEDDED or home(source, "teacher").suffix in ends:
        raise UserError(
            f"teacher.variant: {clipped(source)} is no diffusers folder or Hub id, which alone "
            "have variants; remove it"
        )
    with reading(variant):
        folder = find(source)
        check_asked(source, (p.name for p in folder.glob("**/*.safetensors")))
        teacher = load(source, **options)
    teacher.options["variant"] = variant
    return teacher


def _check_adapters(source: str, options: dict[str, Any]) -> None:
    """Refuse LoRA files that are missing, or for a teacher that is no pipeline; before all else.

    Raises:
        UserError: naming the key.
    """
    from teachers.adapters.files import check

    if not options.get("adapters"):
        options.pop("adapters", None)
        return
    if source.startswith("analytic:") or source.rpartition(":")[0].endswith(".py"):
        raise _no_pipeline(source)
    check(options["adapters"])


def _no_pipeline(source: str) -> UserError:
    return UserError(
        f"teacher.adapters: {clipped(source)} is no diffusers pipeline to which LoRA files "
        "could be added; remove them, or give a pipeline's folder or Hub id"
    )


def file_loader(file: Path, source: str, config: str | None) -> tuple[str, Any]:
    """The family of a single file of weights, by name, and its loader.

    Args:
        config: The folder or Hub id that says what a diffusion pipeline's file does not.
    """
    from teachers.adapters import files
    from teachers.imagenet import checkpoints as imagenet

    who = teacher_at(source)
    if file.suffix in (".pt", ".pth"):
        return "an ImageNet transformer", imagenet.load
    names = single_files.names_of(file, who)
    if imagenet.kind_of(names):
        return "an ImageNet transformer", imagenet.load
    if files.is_lora(names):
        raise UserError(
            f"{who}: it is a LoRA, which changes a model and is none; give the model as "
            f"teacher.source, and this file as teacher.adapters: [{{file: {clipped(file)}}}]"
        )
    folder = single_files.settings(file, config, who)
    family, loader = loader_of(folder, source)
    if "file" not in signature(loader).parameters:
        raise UserError(f"{who}: single files of {family} are not supported; give a folder")

    def load_file(path: Path, source: str, config: str | None = None, **options: Any) -> Teacher:
        return loader(folder, source, file=path, **options)

    own = [p for p in signature(load_file).parameters.values() if p.name != "options"]
    theirs = [p for k, p in signature(loader).parameters.items() if k not in ("folder", "source")]
    keyed = [p.replace(kind=p.KEYWORD_ONLY) for p in theirs if p.default is not p.empty]
    load_file.__signature__ = Signature([*own, *keyed])  # pyright: ignore
    return family, load_file


def loader_of(path: Path, source: str) -> tuple[str, Any]:
    """The family of a folder or pickle, by name, and its loader."""
    if path.suffix == ".pkl" or (path / "config.json").is_file():
        from teachers.edm import checkpoints

        if checkpoints.recognises(path):
            return "an EDM network", checkpoints.load
    index = read_json(path / "model_index.json", teacher_at(source))
    if isinstance(index.get("_class_name"), list):  # a pipeline that comes with its source
        from teachers.edm import checkpoints

        if checkpoints.is_student(index):
            return "a student of EDM2's latents", checkpoints.load_student
    family = str(index.get("_class_name", "a nameless class"))
    known = families()
    if family == "DiTPipeline":
        from teachers.imagenet import checkpoints as imagenet

        if imagenet.is_folder(path, index):
            return family, imagenet.load_folder
    if family not in known:
        from teachers.pipelines import unseen

        if (tried := unseen.loader(family, index)) is not None:
            return family, tried
        raise UserError(
            f"{teacher_at(source)}: {clipped(family)} is not supported; {nearest(family, known)}"
        )
    _check_backends(family, source)
    return family, known[family]


def _check_backends(family: str, source: str) -> None:
    """Refuse a pipeline in whose place diffusers has an object that only names what it needs.

    Raises:
        UserError: naming the packages that are not installed.
    """
    import diffusers

    needs = getattr(getattr(diffusers, family, None), "_backends", ())
    if missing := [name for name in needs if find_spec(name) is None]:
        raise UserError(
            f"{teacher_at(source)}: {family} needs {' and '.join(missing)}; "
            f"pip install {' '.join(missing)}"
        )


def families() -> dict[str, Any]:
    """Loaders by the pipeline class that a folder's model_index.json names."""
    from teachers.edm import checkpoints
    from teachers.families import (
        base,
        dit,
        flux,
        lumina,
        pixart,
        qwen,
        sana,
        sd3,
        stable_diffusion,
        unet,
        wan,
        zimage,
    )
    from teachers.pictured import inpaint, kontext, qwen_edit
    from teachers.pipelines import auraflow, chroma, ernie, flux2, hidream, hunyuan, krea2, longcat

    table: dict[str, Any] = dict.fromkeys(
        unet.UNet.PIPELINES, partial(unet.load, {"EDMModel": checkpoints.network})
    )
    for kind in (
        stable_diffusion.StableDiffusion,
        stable_diffusion.SDXL,
        stable_diffusion.Kolors,
        dit.DiT,
        pixart.PixArtAlpha,
        pixart.PixArtSigma,
        sd3.StableDiffusion3,
        sana.Sana,
        lumina.Lumina2,
        qwen.QwenImage,
        zimage.ZImage,
        auraflow.AuraFlow,
        chroma.Chroma,
        ernie.Ernie,
        hidream.HiDream,
        hunyuan.HunyuanDiT,
        krea2.Krea2,
        longcat.LongCat,
        inpaint.Inpainting,
        inpaint.InpaintingXL,
        qwen_edit.QwenImageEdit,
    ):
        table |= dict.fromkeys(kind.PIPELINES, partial(base.load, kind))
    for kind in (flux.Flux, flux2.Flux2, kontext.Kontext):
        table |= dict.fromkeys(kind.PIPELINES, partial(flux.load, kind))
    return table | dict.fromkeys(wan.Wan.PIPELINES, wan.load)


def pictures_of(source: str) -> str | None:
    """As `Codec.pictures`, from the name of a teacher's pipeline, before anything is loaded.

    Returns:
        None where the name is not known: of a repository that is not on this machine, of files that
        are no pipeline's folder, and of a source that `load` refuses.
    """
    if (known := OUTLINES.get(source)) is not None:
        name = known.pipeline
    else:
        index = home(source, "teacher") / "model_index.json"
        if not isfile(index):
            return None
        name = str(read_json(index, teacher_at(source)).get("_class_name"))
    kinds = getattr(families().get(name), "args", ())
    return next((kind.PICTURES for kind in kinds if hasattr(kind, "PICTURES")), None)


def find(source: str) -> Path:
    """The folder of a local path or of a Hub id, whose files are downloaded once, with its licence.

    Raises:
        UserError: there is no such folder or repository, or it is a single file.
    """
    folder = home(source, "teacher")
    if isdir(folder):  # Path.is_dir raises an error for names that are too long
        return folder
    from teachers.storage import download

    who = teacher_at(source)
    download.refuse_file(source, who)
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        if isfile(folder):
            raise UserError(f"{who}: it is a file; give a diffusers pipeline folder")
        raise UserError(f"{who}: no such folder, and not a Hub id; give OWNER/NAME")
    return download.fetch(source)


def _analytic(source: str) -> Teacher:
    from teachers.analytic import ANALYTIC

    name = source.removeprefix("analytic:")
    if name not in ANALYTIC:
        raise UserError(f"{teacher_at(source)}: unknown; {nearest(name, ANALYTIC)}")
    denoiser = ANALYTIC[name]()
    return Teacher(denoiser.eval(), Pixels(), tuple(denoiser.sample(1).shape[1:]), source)


def _from_function(source: str) -> Teacher:
    """The teacher that a user's own function returns."""
    from teachers.storage.plugin import import_file, settings_kept

    place, _, name = source.rpartition(":")
    if not home(place, "teacher").is_file():
        raise UserError(
            f"{teacher_at(source)}: no such file in {Path.cwd()}; write path/to/file.py:function"
        )
    try:
        module = import_file(home(place, "teacher"))
        function = getattr(module, name, None)
        with settings_kept():
            teacher = function() if callable(function) else None
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{teacher_at(source)}: {clipped(place)} raised {clipped(reason, 200)}; correct it"
        ) from None
    if function is None:
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise UserError(
            f"{teacher_at(source)}: no function {clipped(name)!r} in it; {nearest(name, known)}"
        )
    if not isinstance(teacher, Teacher):
        kind = type(teacher).__name__
        raise UserError(f"{teacher_at(source)}: {name}: expected a Teacher from it, not {kind}")
    if lazy := next((k for k, v in teacher.denoiser.named_parameters() if is_lazy(v)), None):
        raise UserError(
            f"{teacher_at(source)}: {name}: its weight {lazy} has no shape yet; call the network "
            "once before it is returned"
        )
    constants_as_buffers(teacher.denoiser)
    teacher.denoiser.eval().requires_grad_(False)
    teacher.source = teacher.source or source
    return teacher


def constants_as_buffers(network: nn.Module) -> None:
    """Make a network's parameters that do not learn buffers.

    These are integers, such as tables of positions, and what was frozen beside parameters that
    learn, such as random frequencies. A network that is frozen as a whole is one that was loaded
    for inference, and all of it learns.
    """
    some_learn = any(p.requires_grad for p in network.parameters())
    for module in network.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            learns = value.is_floating_point() or value.is_complex()
            if not learns or (some_learn and not value.requires_grad):
                delattr(module, name)
                module.register_buffer(name, value.data)
