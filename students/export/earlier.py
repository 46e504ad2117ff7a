"""A student that starts as an earlier one: with its LoRA, or on its weights."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from students.architecture.score import COMPRESSED
from students.export.folder import SIDECAR, load_student, refuse_unfinished
from students.export.formats import parts
from students.export.forms import form_of
from students.export.lora_files import DIFFUSERS, TURBO
from students.form import StudentForm
from students.generator import Generator, Renoise
from students.lora import AdaptedDenoiser, Adapter, adapter_of, unwrap
from teachers.catalogue.loading import load
from teachers.denoiser import Denoiser
from teachers.errors import UserError, clipped
from teachers.storage.components import networks
from teachers.storage.files import home, read_json
from teachers.teacher import Teacher

KEY = "student.init"
OF_FILES = ("variant", "config")  # options of a teacher's own files, which a smaller one has not
# Settings of a network that an export changes and that leave its other layers as they are.
EXPORTED = ("time_cond_proj_dim", "num_class_embeds", "out_channels")


def student(
    source: str, form: StudentForm, steps: int, renoise: Renoise, adapter: Adapter | None
) -> Generator:
    """A trainable student that starts as the one in a folder.

    An adapter starts with the values of that student's LoRA file, on the teacher's weights. Without
    such a file it is a new adapter on the weights in the folder, to which the teacher's LoRA files
    are added that the student did not have. Without an adapter the weights in the folder learn.

    Args:
        source: A run's folder, or an exported student.
        form: The form of the teacher's students.
        steps, renoise: As `schedulers.student` describes them.

    Raises:
        UserError: there is no student of this teacher in the folder, or its LoRA does not fit the
            adapter.
    """
    if (made := compressed(source)) is not None:
        options = {k: v for k, v in form.teacher.options.items() if k not in OF_FILES}
        like = load(str(made), **options)
        return form_of(fitting(source, like, form.teacher)).student(steps, None, renoise, adapter)
    folder = student_folder(source)
    file = lora_of(folder)
    if adapter is not None and adapter.kind == "lora" and file is not None:
        made = form.student(steps, None, renoise, adapter)
        network = adapter_of(made.denoiser)
        assert network is not None
        start_with(network, load_file(file), file)
        return made
    _, like = load_student(folder, adapters=new_files(folder, form.teacher))
    return form_of(fitting(source, like, form.teacher)).student(steps, None, renoise, adapter)


def fitting(source: str, like: Teacher, teacher: Teacher) -> Teacher:
    """What a student starts as, if it is of the teacher's data.

    Raises:
        UserError: its data have another shape.
    """
    if like.shape != teacher.shape:
        want, got = ("×".join(map(str, s)) for s in (teacher.shape, like.shape))
        raise UserError(
            f"{KEY}: {clipped(source)}: its data are {got} and the teacher's are {want}; name a "
            "student of this teacher"
        )
    return like


def compressed(source: str) -> Path | None:
    """The folder of a teacher's pipeline with a smaller network; None where it is a student's."""
    folder = home(source, KEY)
    return folder if (folder / COMPRESSED).is_file() else None


def plain(config: Any) -> dict[str, Any]:
    """A network's settings as JSON has them, without those that are diffusers' own."""
    own = {k: v for k, v in dict(config).items() if not k.startswith("_")}
    return json.loads(json.dumps(own, default=list))


def outline(source: str, teacher: Teacher) -> Any:
    """The network that a student starts as, without its values, for a plan.

    It is made of the config in the folder, under whatever FakeTensorMode there is; None where the
    folder is not here yet, or has a network of the teacher's own config.

    Raises:
        UserError: the folder is not a student's.
    """
    if not home(source, KEY).is_dir():
        return None
    folder = compressed(source) or student_folder(source)
    network = unwrap(teacher.denoiser)
    with unset_fake_temporarily():
        index = read_json(folder / "model_index.json", KEY)
        config = read_json(folder / network.PART / "config.json", KEY)
    kind: Any = dict(networks(index)).get(network.PART)
    own, theirs = plain(network.backbone.config), plain(config)
    same = all(own.get(k) == v for k, v in theirs.items() if k not in EXPORTED)
    return None if kind is None or same else kind.from_config(theirs)


def denoiser(source: str) -> Denoiser:
    """The frozen network of an earlier student, as it was exported.

    Raises:
        UserError: there is no student in the folder.
    """
    return load_student(student_folder(source))[0].denoiser


def student_folder(source: str, key: str = KEY) -> Path:
    """The exported student in a run's folder, or the folder itself.

    Raises:
        UserError: there is none.
    """
    folder = home(source, key)
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder: {clipped(source)}; give a finished run's")
    for place in (folder, folder / "student"):
        if (place / SIDECAR).is_file():
            return place
    refuse_unfinished(folder)
    raise UserError(
        f"{key}: {clipped(source)} holds no student ({SIDECAR} is missing); give a finished run's "
        "folder, or its student folder"
    )


def lora_of(folder: Path) -> Path | None:
    """The file of a student's adapter alone, on the teacher's weights; None if there is none.

    Args:
        folder: The exported student; its run's folder has the file.
    """
    run = folder.parent
    if folder.name != "student" or not (run / "recipe.yaml").is_file():
        return None
    names = (TURBO[DIFFUSERS], DIFFUSERS)
    return next((file for k in names if (file := run / "lora" / k).is_file()), None)


def new_files(folder: Path, teacher: Any) -> list[dict[str, Any]]:
    """The teacher's LoRA files, by as much as the weights of the student in a folder lack of them.

    A file is known by its content, because it may have another name or strength now.
    """
    if teacher.fusion is None:
        return []
    lacking: list[dict[str, Any]] = []
    held: Counter[str] = Counter()
    for entry in read_json(folder / SIDECAR, KEY).get("adapters") or []:
        held[entry["sha256"]] += entry["strength"]
    for file in teacher.fusion.files:
        if strength := file.strength - held.pop(file.sha256, 0):
            lacking.append({"file": str(file.path), "strength": strength})
    return lacking


@torch.no_grad()
def start_with(adapter: AdaptedDenoiser, state: dict[str, Tensor], file: Path) -> None:
    """Give an adapter the values of a LoRA file that this package wrote.

    A file of lower rank fills the first rows; the others add nothing until they learn.

    Args:
        state: With diffusers' keys, whose scale is 1.

    Raises:
        UserError: the file has other layers, or a higher rank.
    """
    part, config = unwrap(adapter).PART, adapter.config
    scale = config.lora_alpha / config.r
    own: dict[str, tuple[Tensor, str]] = {}
    for name, weight in adapter.trainable().items():
        module, kind = parts(name.removeprefix("backbone."))
        own[f"{part}.{module}.lora_{kind}.weight"] = (weight, kind)
    if strange := sorted(state.keys() ^ own.keys()):
        raise UserError(
            f"adapters.targets: {len(strange)} weights of the adapter and of {clipped(str(file))} "
            f"do not correspond, such as {strange[0]}; set the targets of that student's recipe"
        )
    for key, (weight, kind) in own.items():
        value = state[key]
        rank = len(value) if kind == "A" else value.shape[1]
        if rank > config.r:
            raise UserError(
                f"adapters.rank: {config.r} is less than the {rank} of {clipped(str(file))}; "
                f"set it to {rank} or more"
            )
        if kind == "A":
            weight[:rank].copy_(value)
        else:
            weight.zero_()
            weight[:, :rank].copy_(value / scale)
