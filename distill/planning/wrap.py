"""`distill wrap`: the file that makes a network of one's own a teacher, written from its class.

What the network predicts, its process and its time units are guessed where data and trained weights
are given: every combination is tried, and the one that denoises best is written. The doctor then
checks the file.
"""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass
from itertools import product
from keyword import iskeyword
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.planning.wrap_guess import Guess, best_guess
from distill.planning.wrap_labels import LabelReading, label_reading, own_data
from teachers.diagnosis.evidence import SKILL
from teachers.errors import UserError, clipped, first_line, nearest
from teachers.storage.files import home
from teachers.storage.plugin import import_file, is_installed

# Usual names of a network's second argument, by which it is told from its blocks.
CLOCKS = {"t", "time", "times", "timestep", "timesteps", "sigma", "noise_labels", "noise_level"}
CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}  # and the dimensions of their data
# Above the call of a network that reads a condition, where the data have no labels.
CONDITION = """\
        # TODO: what it reads as its condition. With Pixels(classes=K) below, cond is a dict:
        # {"class_labels": LongTensor (B,)}. With Pixels(), cond is None.
"""
NO_SHAPE = "no shape of data was found that it takes; give --data, with labels where it reads them"


def network_class(place: str) -> tuple[Path, type[nn.Module]]:
    """The file and the class that "mine.py" or "mine.py:Class" names.

    Raises:
        UserError: there is no such file or class, or it is not clear which.
    """
    file, _, name = place.partition(".py:")
    path = python_file(file, place)
    try:
        module = import_file(path)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise UserError(
            f"wrap {clipped(place)!r}: {type(error).__name__}: {clipped(error, 150)}; correct it"
        ) from None
    classes = {
        k: v
        for k, v in vars(module).items()
        if isinstance(v, type) and issubclass(v, nn.Module) and v.__module__ == module.__name__
    }
    if name:
        if name not in classes:
            raise UserError(f"wrap {clipped(place)!r}: no such network; {nearest(name, classes)}")
        return path, classes[name]
    times = {k: v for k, v in classes.items() if set(arguments_of(v)[1:2]) & CLOCKS}
    if len(times) != 1:
        found = ", ".join(times or classes) or "none"
        raise UserError(
            f"wrap {clipped(place)!r}: which class is the network? Found {found}; write "
            f"{path.name}:CLASS, a class with forward(x, t) or forward(x, t, cond)"
        )
    return path, next(iter(times.values()))


def python_file(file: str, place: str) -> Path:
    """The file of Python that "mine.py" or "mine" names.

    Raises:
        UserError: there is none, it names a file of another kind, or one that no other file could
            import.
    """
    path = home(file if file.endswith(".py") else f"{file}.py", "wrap")
    if not path.is_file() and home(file, "wrap").is_file():
        raise UserError(
            f"wrap {clipped(place)!r}: it is no file of Python; give FILE.py, which has the class "
            "of the network"
        )
    if not path.is_file():
        raise UserError(
            f"wrap {clipped(place)!r}: no such file in {Path.cwd()}; give FILE.py, which has the "
            "class of the network"
        )
    if not path.stem.isidentifier() or iskeyword(path.stem) or is_installed(path.stem):
        raise UserError(
            f"wrap {clipped(place)!r}: the adapter imports the file by its name, and {path.stem!r} "
            "is no name for a module or that of an installed one; rename the file"
        )
    return path


def arguments_of(kind: type[nn.Module]) -> list[str]:
    """The names of the arguments of a class's forward, without self."""
    return [n for n in inspect.signature(kind.forward).parameters if n != "self"]


def required(kind: type[nn.Module]) -> list[str]:
    """The arguments without which a class cannot be built."""
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (2, 4)]


def shape_for(network: nn.Module, x: Tensor | None) -> tuple[int, ...] | None:
    """The shape of one datum: that of the data, or one that the network maps to itself."""
    if x is not None:
        return tuple(x.shape[1:])
    layers = list(network.modules())
    conv = next((m for m in layers if isinstance(m, tuple(CONVOLUTIONS))), None)
    first = conv or next((m for m in layers if isinstance(m, nn.Linear)), None)
    width = getattr(first, "in_channels", getattr(first, "in_features", 1))
    # A convolution also takes a sample without a batch, so its own dimensions are tried first.
    own = [dims for kind, dims in CONVOLUTIONS.items() if isinstance(conv, kind)]
    known = dict.fromkeys((*own, 0, 1, 2, 3))
    for dims, channels in product(known, (width, 1, 3)):
        for side in (64, 32, 256, 2048)[: 5 - dims]:
            shape = (channels, *(side,) * dims)
            if (out := output(network, shape)) is not None and out.shape[1:] == shape:
                return shape
    return None


@torch.no_grad()
def output(network: nn.Module, shape: tuple[int, ...]) -> Tensor | None:
    """The network's output for zeros of this shape, without a condition; None if it raises."""
    try:
        out = network(torch.zeros(1, *shape), torch.full((1,), 0.5))
        return out if isinstance(out, Tensor) else None
    except Exception:
        return None


def skeleton(
    path: Path,
    kind: type[nn.Module],
    guess: Guess,
    shape: tuple[int, ...] | None,
    weights: Path | None,
    reading: LabelReading,
) -> str:
    """The source of the adapter file, which lies beside the network's."""
    known = math.isfinite(guess.error) and guess.error < SKILL
    note = (
        f"guessed: x̂ has {guess.error:.2g} of the trivial estimate's error"
        if known
        else "TODO: as it was trained; not known"
    )
    cond = reading.source if reading.value else ""
    arguments = ", ".join(f"{name}=..." for name in required(kind))
    load = "    # TODO: network.load_state_dict(...), the trained weights\n"
    if weights is not None:
        load = f"    network.load_state_dict(load_file({place_of(weights, path)}))\n"
    process = guess.process.partition("(")[0].partition(".")[0]
    imports = "\n" if weights is None else "from safetensors.torch import load_file\n\n"
    pathlib = "from pathlib import Path\n\n" if "Path(" in load else ""
    size = "...  # TODO: the shape of one datum" if shape is None else repr(shape)
    comment = CONDITION if cond and not reading.classes else ""
    return f'''"""{kind.__name__} of {path.name} as a teacher; written by `distill wrap`."""

{pathlib}from {path.stem} import {kind.__name__}
{imports}from teachers import {", ".join(sorted({process, "Network", "Pixels", "Teacher"}))}

PROCESS = {guess.process}  # {note}
PREDICTS = "{guess.predicts}"  # x, eps, v, flow or edm; {note}
SHAPE = {size}


class Adapter(Network):
    def call(self, x_t, t, cond, s):
{comment}        return self.backbone(x_t, {guess.time}{cond})


def teacher():
    network = {kind.__name__}({arguments})
{load}    return Teacher(Adapter(network, PROCESS, PREDICTS), {reading.codec}, SHAPE)
'''


def place_of(weights: Path, path: Path) -> str:
    """The source of the weights' place: relative to the file where they lie beside or below it."""
    weights, folder = weights.resolve(), path.resolve().parent
    if weights.is_relative_to(folder):
        name = weights.relative_to(folder).as_posix()
        return f"Path(__file__).parent / {json.dumps(name, ensure_ascii=False)}"
    return json.dumps(str(weights), ensure_ascii=False)  # in double quotes


@dataclass(frozen=True)
class Adapter:
    """An adapter's source, whether it can be used as it is, and why the network was not tried."""

    source: str
    complete: bool
    fault: str = ""


def adapter(path: Path, kind: type[nn.Module], data: str | None, weights: Path | None) -> Adapter:
    """The adapter of a network's class.

    Raises:
        UserError: the data or the weights are not the network's.
    """
    x, labels = (None, None) if data is None else own_data(data)
    network = None if required(kind) else built(kind, weights)
    reading = label_reading(kind, network, x, labels)
    if network is None:
        shape = None if x is None else tuple(x.shape[1:])
        return Adapter(skeleton(path, kind, Guess(), shape, weights, reading), False)
    guess, shape, fault = Guess(), shape_for(network, x), NO_SHAPE
    if x is not None and weights is not None:
        guess = best_guess(network, x, labels, reading)
        fault = guess.fault
    elif shape is not None:
        example = torch.zeros(1, *shape) if x is None else x[:2].float()
        fault = reading.fault(network, example, None if labels is None else labels[:2])
    return Adapter(skeleton(path, kind, guess, shape, weights, reading), not fault, fault)


def built(kind: type[nn.Module], weights: Path | None) -> nn.Module:
    """A network of a class that needs no arguments, with its weights.

    Raises:
        UserError: the class raises an exception, or the weights are not its own.
    """
    from safetensors.torch import load_file

    torch.manual_seed(0)
    try:
        network = kind()
        if weights is not None:
            network.load_state_dict(load_file(weights))
    except Exception as error:
        option = "wrap" if weights is None else f"--weights {weights}"
        reason = clipped(first_line(error), 150)
        raise UserError(f"{option}: {kind.__name__}: {reason}; correct it") from None
    return network.eval().requires_grad_(False)
