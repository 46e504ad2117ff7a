"""All checks of the doctor: of a teacher, and of the students that are made from it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from eval.images import files_in as every_file
from eval.images import is_image, open_image, to_srgb
from students.generator import Generator
from teachers import conditions
from teachers.analytic import Finite, Gaussian, Mixture
from teachers.diagnosis.checks import Check, Subject, check, relative
from teachers.diagnosis.structure import checks_of, dead_leaves, examine, subject_of
from teachers.errors import UserError, first_line
from teachers.families.base import Prompted
from teachers.storage.plugin import called, is_function
from teachers.teacher import Pixels, Teacher

PICTURES = 4  # the least number of pictures
VIDEOS = 2  # and of videos
MOST = 32  # the most that are read from a folder
ROWS = 64  # of data that are no pictures


def diagnose(
    teacher: Teacher,
    images: Tensor,
    prompts: Sequence[Any] | None = None,
    structure_only: bool = False,
) -> list[Check]:
    """The checks of `teachers.diagnosis.structure`, and whether students train as they are sampled.

    Args: as for `examine`.
    """

    def students() -> Iterator[Check]:
        yield trained_as_sampled(subject_of(teacher, images, prompts, None))

    with warnings.catch_warnings():
        # PyTorch says so of each norm whose weight autocast leaves in float32
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        checks = examine(teacher, images, prompts, structure_only=structure_only)
        if any(c.verdict == "broken" for c in checks):
            return checks
        return [*checks, *checks_of("students", students)]


def trained_as_sampled(subject: Subject) -> Check:
    """Whether a four-step student computes the same x̂ in training as in sampling, at every step."""
    denoiser, process = subject.denoiser, subject.denoiser.process
    few = slice(0, 2)
    z = torch.randn(subject.x[few].shape, generator=torch.Generator().manual_seed(1)).to(subject.x)
    cond = conditions.rows(subject.cond, few)
    times = process.grid(4).tolist()
    fresh, worst = [z.flip(0) * k for k in (1, -1, 0.5)], 0.0
    for renoise in (True, False):
        student = Generator(denoiser, times, renoise)
        at = [z.new_full((len(z),), t) for t in times]
        x_t = z * process.at(at[0], z)[1]
        for i, (t, s) in enumerate(zip(at, [*at[1:], None])):
            with torch.no_grad():
                x = denoiser(x_t, t, cond)
            in_training = student(z, cond, i + 1, fresh).detach()  # gradients are on
            worst = max(worst, relative(in_training, x))
            if s is not None and renoise:
                x_t = process.noise(x, s, fresh[i])
            elif s is not None:
                x_t = process.step(x_t, x, t, s)
    return check(
        "train input = inference input", worst, "≤ 1e-3", worst <= 1e-3,
        "call(): a student's chain differs between training and sampling; the network keeps a "
        "state from call to call, or asks whether gradients are on",
    )  # fmt: skip


def examples_for(teacher: Teacher, path: Path | None) -> tuple[Tensor, list[Any] | None]:
    """What `pictures_for` returns, and its labels or prompts if a function returns these too."""
    if path is None or is_exact(teacher) or not is_function(str(path)):
        return pictures_for(teacher, path), None
    x, prompts = own_data(teacher, str(path))
    return x, prompts if teacher.codec.classes else None


def pictures_for(teacher: Teacher, path: Path | None) -> Tensor:
    """Pictures of the teacher's size: from a file or a folder, or synthetic ones without a path.

    Returns:
        (N, C, H, W) in [-1, 1]; still videos (N, C, F, H, W) for teachers of videos; or points
        (N, D) for teachers in closed form.

    Raises:
        UserError: the path has no readable picture, or the codec takes none.
    """
    denoiser = teacher.denoiser
    if isinstance(denoiser, Gaussian | Mixture | Finite):
        if path is not None:
            raise UserError("--image: a teacher in closed form has its own data; remove the option")
        if isinstance(denoiser, Finite):
            return denoiser.items
        return denoiser.sample(256)
    if path is not None and is_function(str(path)):
        return own_data(teacher, str(path))[0]
    if not has_pictures(teacher):
        if path is not None:
            raise UserError(
                f"--image {path}: the teacher's data {teacher.shape} are no pictures; give "
                "FILE.py:FUNCTION, which returns data"
            )
        return torch.randn(ROWS, *teacher.shape, generator=torch.Generator().manual_seed(0))
    channels, *frames, height, width = picture_shape(teacher)
    few = VIDEOS if frames else PICTURES
    if path is None:
        images = dead_leaves(few, channels, (height, width))
    else:
        images = torch.stack([picture(p, channels, (height, width)) for p in files_in(path)])
        images = images if len(images) >= few else images.repeat(few, 1, 1, 1)
    return images.unsqueeze(2).expand(-1, -1, frames[0], -1, -1) if frames else images


def has_pictures(teacher: Teacher) -> bool:
    """Whether test images can stand for the data of a teacher: not where these are no pictures."""
    return not isinstance(teacher.codec, Pixels) or takes_pictures(teacher) or is_exact(teacher)


def is_exact(teacher: Teacher) -> bool:
    """Whether the teacher is a closed form, which has its own data."""
    return isinstance(teacher.denoiser, Gaussian | Mixture | Finite)


def takes_pictures(teacher: Teacher) -> bool:
    """Whether a teacher of data that nothing encodes has the shape of pictures.

    Data of four dimensions are volumes, or videos without a codec: no picture stands for these.
    """
    return len(teacher.shape) == 3 and teacher.shape[0] in (1, 3)


def own_data(teacher: Teacher, place: str) -> tuple[Tensor, list[Any] | None]:
    """Data (N, ...) that a function in the user's file returns, and their labels, if any.

    Raises:
        UserError: it raises an exception, or they are of another shape, or not as many.
    """
    result = called(place, "--image")
    x, prompts = result, None
    if isinstance(result, tuple) and result:
        x, prompts = result[0], result[1] if len(result) == 2 else None
    if not isinstance(x, Tensor) or x.shape[1:] != teacher.shape:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"--image {place}: it returned {got}; return data (N, {teacher.shape})")
    few = slice(None, None, max(1, len(x) // ROWS))
    if prompts is not None:
        prompts = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
        if len(prompts) != len(x):
            raise UserError(
                f"--image {place}: {len(x)} data and {len(prompts)} labels; return as many of each"
            )
        prompts = prompts[few][:ROWS]
    return x[few][:ROWS].float(), prompts


def files_in(path: Path) -> list[Path]:
    """The file that --image names, or the first pictures of a folder."""
    if not path.exists():
        raise UserError(f"--image {path}: no such file or folder")
    if not path.is_dir():
        return [path]
    files = [p for p in every_file(path) if is_image(p)][:MOST]
    if not files:
        raise UserError(f"--image {path}: it holds no images; give .png, .jpg or .webp")
    return files


def picture_shape(teacher: Teacher) -> tuple[int, ...]:
    """Channels, height and width of the pictures that the codec encodes to the teacher's shape;
    (C, F, H, W) for videos."""
    if isinstance(teacher.codec, Prompted):
        return (3, *teacher.codec.size)
    shape = teacher.shape
    channels = shape[0] if shape[0] in (1, 3) else 3
    try:
        with torch.no_grad():
            data = teacher.codec.encode(torch.zeros(1, channels, 64, 64))
    except (Exception, SystemExit) as error:  # whatever a user's codec raises
        raise UserError(
            f"codec.encode: it raised {type(error).__name__} for a picture "
            f"(1, {channels}, 64, 64): {first_line(error)}"
        ) from None
    factor = max(64 // data.shape[-1], 1)
    return channels, shape[-2] * factor, shape[-1] * factor


def picture(path: Path, channels: int, size: tuple[int, int]) -> Tensor:
    """A picture (C, H, W) in [-1, 1], resized to cover the size and cropped at its centre."""
    from torchvision.transforms import functional as tf

    try:
        with open_image(path) as file:
            image = to_srgb(file).convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's range over many types for a bad file
        raise UserError(f"--image {path}: it is not a readable image ({error})") from None
    scale = max(size[0] / image.height, size[1] / image.width)
    covering = [round(image.height * scale), round(image.width * scale)]
    image = tf.center_crop(tf.resize(image, covering, antialias=True), list(size))  # pyright: ignore
    return tf.pil_to_tensor(image).float() / 127.5 - 1  # pyright: ignore


def table(source: str, checks: Sequence[Check]) -> Table:
    """One row for each check."""
    rows = Table(title=source, title_justify="left", box=None, pad_edge=False)
    for name in ("promise", "measured", "should be", "verdict"):
        rows.add_column(name, justify="right" if name == "measured" else "left")
    styles = {"ok": "green", "left out": "dim"}
    for c in checks:
        value = "" if c.value is None else f"{c.value:.3g}"
        rows.add_row(c.name, value, c.bound, Text(c.verdict, styles.get(c.verdict, "red")))
    return rows


def verdict(checks: Sequence[Check]) -> str:
    """One line: passed or broken, and how many checks were made."""
    counts = {v: sum(c.verdict == v for c in checks) for v in ("ok", "left out")}
    broken = len(checks) - sum(counts.values())
    rest = f", {counts['left out']} left out" if counts["left out"] else ""
    if broken:
        return f"broken: {broken} of {len(checks) - counts['left out']} checks{rest}"
    return f"passed: {counts['ok']} checks{rest}"
