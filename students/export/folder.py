"""Export: a finished student as a folder that stock diffusers loads and samples exactly."""

from __future__ import annotations

import inspect
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from students import schedulers
from students.export.encoders import RecordedEncoders
from students.export.portable import make_portable
from students.generator import Generator
from students.landing import (
    Fold,
    check_landing,
    folds,
    in_place,
    landing_of,
    lands_at_0,
    stock_backbone,
)
from students.lora import adapter_of, network_of, unwrap
from students.scale_reading import GuidedStudent, pipeline_scale, reading_of, scale_reading
from teachers import conditions
from teachers.catalogue.loading import load
from teachers.conditions import Pictured
from teachers.denoiser import Cond, Denoiser
from teachers.errors import UserError, clipped
from teachers.families import unet
from teachers.families.base import Pretrained, Prompted, images_of, quiet
from teachers.families.unet import UNet
from teachers.quantised import Precision
from teachers.storage.files import open_to_readers, read_json, save_tensors
from teachers.teacher import Teacher

SIDECAR = "fewstep.json"  # describes the student; diffusers ignores it
ROUTER = "router.json"  # in the folder of several students
SAMPLER = "sampler.py"  # in the folder of a student of a network of one's own
SHAPING = ("size", "frames", "embedded_guidance")  # options of a teacher that students share
TOLERANCE = 1e-3  # of any pixel in [0, 1]: a quarter of a grey level
ROUNDING = 0.02  # of the mean pixel, for weights of half precision; a wrong time exceeds it

# In a process without our packages: reads a file of pictures, arguments that JSON does not hold.
PICTURES = """
def pictures_in(file=""):
    if not file:
        return {}
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior
    from PIL import Image
    from safetensors.torch import load_file
    Posterior.sample = lambda posterior, generator=None: posterior.mode()
    def images(v):
        return [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in v]
    return {k: images(v) if v.dtype == torch.uint8 else v for k, v in load_file(file).items()}
"""
# Runs in another process without our packages, as on a user's machine.
SCRIPT = (
    PICTURES
    + """
import functools, json, sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
folder, out, request = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
pictures = pictures_in(request.get("pictures", ""))
options = {"trust_remote_code": True} if request["own"] else {}
pipe = DiffusionPipeline.from_pretrained(folder, **options, **dict.fromkeys(request["absent"]))
pipe.to(request["device"]).set_progress_bar_config(disable=True)
images = {}
step = None if request["seeded"] else pipe.scheduler.step
for steps in request["counts"]:
    torch.manual_seed(1)  # for schedulers that draw from no other generator
    draw = torch.Generator().manual_seed(0)
    if not request["seeded"]:  # a scheduler left to itself draws on the GPU, from other numbers
        again = torch.Generator().manual_seed(1)
        pipe.scheduler.step = functools.partial(step, generator=again)
    arguments = json.loads(sys.argv[3])["arguments"]  # afresh: some pipelines write to their lists
    arguments |= pictures
    out_ = pipe(num_inference_steps=steps, generator=draw, output_type="pt", **arguments)
    made = next(iter(out_.values()))
    if not torch.is_tensor(made):  # DiT's pipeline before diffusers 0.41, whatever it is asked
        made = torch.from_numpy(made).movedim(-1, 1)
    images[str(steps)] = made.float().cpu().contiguous()
save_file(images, out)
"""
)


class ExportError(RuntimeError):
    """The exported files do not reproduce the student's pictures. The message is one line."""

    @classmethod
    def of(cls, what: str, stderr: str) -> ExportError:
        """The error of a failed process: its last line of stderr, with the rest as a note."""
        lines = [v.strip() for v in stderr.splitlines() if v.strip()] or ["no message"]
        error = cls(f"stock diffusers could not use {what}: {lines[-1]}")
        error.add_note(stderr[-20_000:])
        return error


def export(generator: Generator, teacher: Teacher, path: Path, recipe: Mapping[str, Any]) -> None:
    """Write the student to `path` as a diffusers folder.

    First a separate process loads the folder with stock diffusers only, and its pixels are compared
    with the student's for a fixed seed at every step count; `path` appears only if they agree.

    Args:
        recipe: The resolved recipe; the folder's sidecar holds it, and cards are written from it.

    Raises:
        UserError: the student has no scheduler form.
        ExportError: the pictures differ, or the folder does not load.
    """
    pipe = pipeline(generator, teacher)
    network = unwrap(generator.denoiser)
    if not isinstance(generator.denoiser, GuidedStudent):
        network.unguided(getattr(pipe, network.PART))
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}-*"):  # of an export that was killed
        shutil.rmtree(stale, ignore_errors=True)
    draft = path.parent / f".{path.name}-{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        with quiet():
            pipe.save_pretrained(draft)
        make_portable(draft, teacher.codec.folder)
        open_to_readers(draft)
        if brings_source(network):
            write_source(draft, network, pipe)
        about = sidecar(generator, teacher, recipe)
        (draft / SIDECAR).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        verify(draft, generator, teacher)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def sidecar(generator: Generator, teacher: Teacher, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The sidecar of an exported folder: what diffusers' own files do not hold."""
    student = generator.denoiser
    scaled = student if isinstance(student, GuidedStudent) else reading_of(student)
    return {
        "guidance": None if scaled is None else scaled.facts(),
        "steps": list(generator.counts),
        "times": list(generator.times),
        "renoise": generator.renoise,
        **({} if generator.gamma is None else {"gamma": generator.gamma}),
        "teacher": teacher.source,
        "options": {k: v for k, v in teacher.options.items() if k in SHAPING},
        "adapters": [] if teacher.fusion is None else teacher.fusion.contents(),
        "recipe": dict(recipe),
    }


def brings_source(network: Denoiser) -> bool:
    """Whether the export includes the network's source, because diffusers has no such class."""
    from teachers.edm.model import EDM  # slow: it imports diffusers' models
    from teachers.imagenet.model import SiT
    from teachers.reduced.source import CLASSES

    return isinstance(network, EDM | SiT) or isinstance(network_of(network).backbone, CLASSES)


def write_source(folder: Path, network: Pretrained, pipe: Any) -> None:
    """Add the source of a network that brings it to the folder of its pipeline."""
    from students.export.sources import edm, imagenet
    from teachers.reduced import source as reduced

    if isinstance(network.backbone, reduced.CLASSES):
        reduced.write(folder, network.PART, network.backbone)
        return
    source: Any = edm if network.PART == "unet" else imagenet
    source.write(folder, pipe)


def pipeline(generator: Generator, teacher: Teacher, merge: bool = True, cond: Cond = None) -> Any:
    """The stock pipeline that samples this student, with its network and its scheduler.

    Args:
        merge: Merge an adapter into new weights. Otherwise the pipeline has the shared weights,
            which are the student's within `in_place` only.
        cond: A condition of `prompts_of`, if it is known already.

    Raises:
        UserError: the student has no scheduler form, or several landings of one time.
    """
    try:
        network = unwrap(generator.denoiser)
    except UserError as error:
        raise UserError(f"export: {error}") from None
    check_landing(generator)
    backbone: Any = network.backbone
    if merge:
        backbone = stock_backbone(generator.denoiser, landing_folds(generator, teacher, cond))
    scheduler = schedulers.scheduler(generator)
    if isinstance(network, UNet):
        if adapter_of(generator.denoiser) is not None:
            schedulers.trim(backbone, teacher)
        return unet.pipeline(teacher.codec, backbone, scheduler)
    before = teacher.codec.pipe  # pyright: ignore[reportAttributeAccessIssue]
    parts = {**before.components, network.PART: backbone, "scheduler": scheduler}
    known = inspect.signature(type(before).__init__).parameters
    settings = {k: v for k, v in before.config.items() if k in known and k not in parts}
    return type(before)(**parts, **settings)


def landing_folds(generator: Generator, teacher: Teacher, cond: Cond = None) -> list[Fold]:
    """What the time layers of a student of two times take up; nothing of other students.

    Args:
        cond: A condition of `prompts_of`, if it is known already.
    """
    if landing_of(generator) is not None and not lands_at_0(generator) and cond is None:
        cond = teacher.codec.condition(prompts_of(teacher))
    return folds(generator, teacher.shape, cond)


def request(generator: Generator, teacher: Teacher) -> tuple[list[Any], dict[str, Any]]:
    """What checks of a student sample: prompts, and the stock pipeline's arguments for them."""
    kind, prompts = type(unwrap(generator.denoiser)), prompts_of(teacher)
    if isinstance(teacher.codec, Prompted):
        arguments = teacher.codec.arguments([*prompts])
        if (scale := pipeline_scale(generator.denoiser)) is not None:
            arguments["guidance_scale"] = scale
        if generator.gamma is not None:
            arguments["eta"] = generator.gamma
        return prompts, arguments
    arguments = kind.arguments([*prompts], teacher.shape[-2:])
    if issubclass(kind, UNet) and not teacher.codec.classes:
        arguments["class_labels"] = None
    return prompts, arguments


def prompts_of(teacher: Teacher) -> list[Any]:
    """The labels or prompts that checks of its students sample."""
    if classes := teacher.codec.classes:
        return [i % classes for i in range(4)]
    prompts = ["a red circle", "two boats on a lake"]
    if not teacher.codec.pictures:
        return prompts
    assert isinstance(teacher.codec, Prompted)
    return [example(text, i, *teacher.codec.size[-2:]) for i, text in enumerate(prompts)]


def example(text: str, number: int, height: int, width: int) -> Pictured:
    """A prompt with a picture of smooth waves, and with a rectangle in it as its mask."""
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    waves = [torch.sin((3 + number) * x + (2 + k) * y + k) for k in range(3)]
    mask = ((x > 0.25) & (x < 0.75) & (y > 0.3 - 0.2 * number)).float()
    return Pictured(text, 0.9 * torch.stack(waves), mask[None])


def apart(arguments: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], str]:
    """A pipeline's arguments without pictures, and the file that these were written to; "" if there
    are none. Images of Pillow, which stand in lists, are written as uint8."""
    tensors = {k: v.contiguous() for k, v in arguments.items() if isinstance(v, Tensor)}
    for key, value in arguments.items():
        if isinstance(value, list) and isinstance(value[0], Image.Image):
            pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in value]
            tensors[key] = torch.stack(pixels).contiguous()
    if tensors:
        save_tensors(tensors, file)
    return {k: v for k, v in arguments.items() if k not in tensors}, str(file) if tensors else ""


@contextmanager
def posterior_modes(pictures: bool) -> Iterator[None]:
    """Within it, VAEs of stock pipelines take the mode of their posterior, as our codecs do, and
    not a sample.

    Args:
        pictures: Whether the pipeline has a picture as its condition; else nothing changes.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

    if not pictures:
        yield
        return
    sample = Posterior.sample
    Posterior.sample = lambda self, generator=None: self.mode()
    try:
        with quiet():  # these pipelines move their VAE at each call, of which diffusers warns
            yield
    finally:
        Posterior.sample = sample


def absent_parts(teacher: Teacher) -> list[str]:
    """Parts that the pipeline requires, although they are None, such as SD3's T5."""
    if not isinstance(teacher.codec, Prompted):
        return []
    pipe = teacher.codec.pipe
    optional = type(pipe)._optional_components
    return [k for k, v in pipe.components.items() if v is None and k not in optional]


def verify(folder: Path, generator: Generator, teacher: Teacher) -> None:
    """Compare the pictures that stock diffusers makes from the folder with ours.

    It runs in another process.

    Raises:
        ExportError: they differ by more than rounding, or the process fails.
    """
    prompts, arguments = request(generator, teacher)
    network, counts = unwrap(generator.denoiser), generator.counts
    theirs = drawn_elsewhere(folder, network, teacher, counts, arguments, brings_source(network))
    for steps in counts:
        with without_tf32():
            ours = pictures(generator, teacher, steps, prompts)
        if difference := pixel_difference(ours, theirs[str(steps)], generator):
            raise ExportError(f"at {steps} steps the exported pipeline {difference}")


def drawn_elsewhere(
    folder: Path,
    network: Pretrained,
    teacher: Teacher,
    counts: Sequence[int],
    arguments: Mapping[str, Any],
    own: bool,
) -> dict[str, Tensor]:
    """The pictures (N, ...) in [0, 1] that diffusers alone draws from a folder, by step count.

    Args:
        network: As it is in the folder; its device is the one that is drawn on.
        arguments: Of the pipeline.
        own: Whether the folder brings source of its own.

    Raises:
        ExportError: the process fails.
    """
    job = {
        "counts": counts,
        "absent": absent_parts(teacher),
        "device": next(network.parameters()).device.type,
        "own": own,
        "seeded": network.SEEDED,
    }
    return drawn_apart(folder, job, arguments, "the student's folder")


def drawn_apart(
    folder: Path, job: Mapping[str, Any], arguments: Mapping[str, Any], what: str
) -> dict[str, Tensor]:
    """What a folder's pipeline draws in a process without our packages, by step count.

    Args:
        job: The keys that SCRIPT reads, but for the arguments.
        arguments: Of the pipeline.
        what: The folder, for messages.

    Raises:
        ExportError: the process fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "images.safetensors"
        plain, file = apart(arguments, Path(scratch) / "pictures.safetensors")
        job = {**job, "arguments": plain, "pictures": file}
        # -I: the child finds our packages neither in this folder nor by PYTHONPATH
        command = [
            sys.executable,
            "-I",
            "-c",
            SCRIPT,
            str(folder.resolve()),
            str(out),
            json.dumps(job),
        ]
        result = subprocess.run(
            command,
            cwd=scratch,
            capture_output=True,
            text=True,
            env={**child_environment(), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": scratch},
        )
        if result.returncode:
            raise ExportError.of(what, result.stderr)
        from safetensors.torch import load_file

        return load_file(out)


def pixel_difference(ours: Tensor, theirs: Tensor, generator: Generator) -> str:
    """How pictures differ by more than rounding; empty if they do not."""
    gap = (ours - theirs.float().cpu()).abs()
    if unwrap(generator.denoiser).dtype == torch.float32:
        worst, most, what = gap.max().item(), TOLERANCE, "a pixel"
    else:
        worst, most, what = gap.mean().item(), ROUNDING, "the mean pixel"
    if worst <= most:
        return ""
    return (
        f"differs from the student by {worst:.2g} at {what}'s range; at most {most:g} is rounding"
    )


def pictures(
    generator: Generator, teacher: Teacher, steps: int, prompts: list[Any], cond: Cond = None
) -> Tensor:
    """The student's pictures for seed 0, as a stock pipeline's "pt" output: in [0, 1].

    Args:
        cond: The prompts' condition, if it is known already.
    """
    x = sample_student(generator.at(steps), teacher, prompts, seed=0, cond=cond)
    images = (teacher.codec.decode(x) / 2 + 0.5).clamp(0, 1).cpu()
    return images.movedim(1, 2) if images.ndim == 5 else images  # videos have their frames first


@torch.no_grad()
def rehearse(
    generator: Generator, teacher: Teacher, encoders: RecordedEncoders | None = None
) -> None:
    """Before training, compare the stock pipeline's samples, in this process, with the student's.

    On the device beside the student are only the VAE, which decodes one image at a time, and a text
    encoder while it encodes prompts that `encoders` has not recorded.

    Raises:
        UserError: they differ, or the pipeline fails, and so would the export after training.
    """
    who = f"teacher {teacher.source!r}: no stock pipeline samples its students"
    prompts = prompts_of(teacher)
    network = unwrap(generator.denoiser)
    device = next(generator.parameters()).device
    half = network.dtype != torch.float32
    encoders = encoders or RecordedEncoders(teacher, device)
    try:
        cond = encoders.condition(prompts)
        with (
            encoders.on_host(device),
            decoding_singly(teacher, device),
            posterior_modes(bool(teacher.codec.pictures)),
            torch.autocast(device.type, network.dtype, enabled=half),
            without_tf32(),
        ):
            pipe = pipeline(generator, teacher, isinstance(network, UNet), cond)
            changes = landing_folds(generator, teacher, cond)
            pipe.set_progress_bar_config(disable=True)
            step = pipe.scheduler.step
            for steps in generator.counts:
                rng = torch.Generator().manual_seed(0)
                if not network.SEEDED:  # on a GPU, the global generator draws other numbers
                    pipe.scheduler.step = partial(step, generator=torch.Generator().manual_seed(1))
                _, arguments = request(generator, teacher)  # afresh: some write to their lists
                with torch.random.fork_rng(), in_place(generator.denoiser, changes):
                    torch.manual_seed(1)
                    out = pipe(
                        num_inference_steps=steps, generator=rng, output_type="pt", **arguments
                    )
                ours = pictures(generator, teacher, steps, prompts, cond)
                if difference := pixel_difference(ours, images_of(out), generator):
                    raise UserError(f"{who}: at {steps} steps it {difference}")
    except UserError:
        raise
    except Exception as error:  # whatever an odd configuration breaks in diffusers
        raise UserError(f"{who} ({type(error).__name__}: {error})") from None


@contextmanager
def decoding_singly(teacher: Teacher, device: torch.device) -> Iterator[None]:
    """Within it, the codec's VAE is on the device and decodes one image at a time."""
    vae: Any = teacher.codec.vae
    if vae is None:
        yield
        return
    sliced = getattr(vae, "use_slicing", None)  # a setting of most of diffusers' VAEs
    vae.to(device)
    try:
        if sliced is not None:
            vae.use_slicing = True
        yield
    finally:
        if sliced is not None:
            vae.use_slicing = sliced
        vae.to(torch.device("cpu"))


def child_environment() -> dict[str, str]:
    """This process's environment for a child that checks an export.

    It lacks the variables by which a child joins its process group, and has NVIDIA's by which
    float32 products are not rounded to TF32.
    """
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
    return kept | {"NVIDIA_TF32_OVERRIDE": "0"}


@contextmanager
def without_tf32() -> Iterator[None]:
    """Within it, float32 products on a GPU keep their digits.

    PyTorch lets cuDNN's convolutions round their inputs to TF32's ten bits. An adapter beside its
    weights and the same adapter merged into them then differ by a grey level.
    """
    places: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = False
        yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed


@torch.no_grad()
def sample_student(
    generator: Generator,
    teacher: Teacher,
    labels: Sequence[Any],
    seed: int,
    batch: int = 512,
    cond: Cond = None,
    noise: Sequence[Tensor] | None = None,
) -> Tensor:
    """x̂ (N, ...) for N labels or prompts, from the same noise that a stock pipeline draws.

    All noise is drawn by CPU generators before the batches, so the pictures depend neither on the
    device nor on the batch size. A network that draws noise itself takes it from the global
    generator of the seed `seed` + 1, batch by batch.

    Args:
        cond: The labels' condition, if it is known already.
        noise: As `noise_of`, if it is drawn already.
    """
    noise = noise_of(generator, teacher, len(labels), seed) if noise is None else noise
    cond = teacher.codec.condition(list(labels)) if cond is None else cond
    device = next(generator.parameters()).device
    parts = []
    with own_noise(seed + 1):
        for i in range(0, len(labels), batch):
            z, *noises = [x[i : i + batch].to(device) for x in noise]
            part = conditions.moved(conditions.rows(cond, slice(i, i + batch)), device)
            parts.append(generator(z, part, noises=noises))
    return torch.cat(parts)


def noise_of(generator: Generator, teacher: Teacher, n: int, seed: int) -> list[Tensor]:
    """The noise (N, ...) that sampling starts at, and that of each renoising.

    Pipelines that pass their generator to the scheduler draw all noise from it; the others'
    schedulers draw the noise of renoising from a generator of seed `seed` + 1, as they do on the
    CPU after `torch.manual_seed`.
    """
    network = network_of(generator.denoiser)
    own = not isinstance(network, Pretrained)  # `sampler_file.py` has one generator
    kind = Pretrained if own else type(network)
    rng = torch.Generator().manual_seed(seed)
    again = rng if own or kind.SEEDED else torch.Generator().manual_seed(seed + 1)
    noise = [torch.randn(n, *teacher.shape, generator=rng)]
    layout = kind.pack(noise[0]).shape
    for _ in range(len(generator.times) - 1 if generator.renoise else 0):
        noise.append(kind.unpack(torch.randn(layout, generator=again), teacher.shape))
    return noise


@contextmanager
def own_noise(seed: int) -> Iterator[None]:
    """Within it, networks that draw noise draw it from this seed (`teachers/reduced/haar.py`)."""
    drawn = torch.default_generator.get_state()
    try:
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.default_generator.set_state(drawn)


def has_student(folder: Path) -> bool:
    """Whether a folder is an exported student, or a run that has one."""
    return any((folder / name / SIDECAR).is_file() for name in (".", "student"))


def refuse_unfinished(folder: Path) -> None:
    """Refuse the folder of a run that has not exported its student, or of a network of one's own.

    Raises:
        UserError: it is one.
    """
    if has_student(folder):
        return
    for own in (folder, folder / "student"):
        if (own / SAMPLER).is_file() and (own / "config.json").is_file():
            raise UserError(
                f"student {str(folder)!r}: it is of a network of your own, and diffusers loads no "
                f"such student; draw with sample() of {own / SAMPLER}"
            )
    if (folder / "checkpoints").is_dir():
        raise UserError(
            f"student {str(folder)!r}: this run has no student yet; wait for its end, or resume "
            f"it with distill run {folder / 'recipe.yaml'} --out {folder} --resume"
        )


def student_folder(folder: Path) -> Path:
    """The folder of the exported student that a folder is, or that a run has.

    Raises:
        UserError: there is no such folder, or the run has not exported its student.
    """
    if not folder.is_dir():
        raise UserError(
            f"student {clipped(str(folder))!r}: no such folder; give a run's folder or a student's"
        )
    if not (folder / SIDECAR).exists() and (folder / "student" / SIDECAR).exists():
        return folder / "student"  # a run folder was named
    refuse_unfinished(folder)
    if (folder / ROUTER).is_file():
        raise UserError(
            f"student {clipped(str(folder))!r}: it is a pipeline of several students; give one of "
            "those in it, or measure all by distill eval"
        )
    return folder


def load_student(
    folder: Path, precision: Precision | None = None, adapters: Sequence[Any] = ()
) -> tuple[Generator, Teacher]:
    """An exported student: its generator, and the folder as a teacher, whose codec it uses.

    Args:
        precision: Of its weights; by default float32.
        adapters: LoRA files to add to its weights, as `teachers.load` takes them.

    Raises:
        UserError: the folder is no exported student, or is damaged, or a LoRA file does not fit.
    """
    folder = student_folder(folder)
    sidecar = read_json(folder / SIDECAR, f"student {str(folder)!r}")
    counts: Any = sidecar.get("steps")
    whole = isinstance(counts, list) and counts and all(type(k) is int for k in counts)
    options = sidecar.get("options", {})  # older students have none
    whole = whole and isinstance(options, dict) and options.keys() <= set(SHAPING)
    if not whole or sidecar.get("renoise") not in (True, False, "posterior"):
        raise UserError(f"student {str(folder)!r}: {SIDECAR} is damaged; export the run again")
    if precision is not None:
        options = {**options, "precision": precision}
    if adapters:
        options = {**options, "adapters": list(adapters)}
    teacher = load(str(folder), **options)
    like = schedulers.student(teacher, max(counts), None, sidecar["renoise"], exported=True)
    if unknown := set(counts) - set(like.counts):
        raise UserError(
            f"student {str(folder)!r}: {SIDECAR}: steps: {min(unknown)} is no step count of this "
            "student; export the run again"
        )
    if "gamma" in sidecar:
        like = schedulers.renoised_in_part(like, sidecar["gamma"])
    guidance = sidecar.get("guidance") or {}  # older students have none
    if guidance.get("input"):
        like = scale_reading(like, tuple(guidance["range"]), guidance["scale"])
    elif guidance.get("guided"):
        like.denoiser = GuidedStudent(like.denoiser, guidance["scale"], teacher.codec.null)
    return like.keep(*counts).eval().requires_grad_(False), teacher
