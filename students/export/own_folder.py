"""Export of a network of the user's own: weights, times, its source, and a sampler.

The folder needs torch and safetensors and no code of ours. Another process loads it and compares
its samples with the student's.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import asdict, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from students.adapter_layers import adapter_layers, adapter_names
from students.export import sampler_file
from students.export.folder import (
    ExportError,
    child_environment,
    sample_student,
    without_tf32,
)
from students.export.sources.user import sources_of
from students.generator import Generator
from students.lora import adapter_of, merged_weight, network_of, view_of
from students.own_network import arguments_of, example_condition, is_plain
from teachers.denoiser import PREDICTIONS, Cond, Network
from teachers.errors import UserError, first_line, teacher_at
from teachers.process import Process, Tabulated
from teachers.storage.files import open_to_readers, save_tensors
from teachers.teacher import Teacher

TOLERANCE = 1e-5  # of any number of a sample, relative to the largest one where that is above 1
SAMPLES = 4  # that are compared, at each step count

# Runs in another process, which finds our packages neither in its folder nor by PYTHONPATH.
SCRIPT = """
import importlib.util, json, sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
folder, scratch, n, counts = Path(sys.argv[1]), Path(sys.argv[2]), *json.loads(sys.argv[3])
spec = importlib.util.spec_from_file_location("sampler", folder / "sampler.py")
sampler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sampler)
cond = load_file(scratch / "cond") if (scratch / "cond").exists() else None
samples = {str(k): sampler.sample(folder, n, k, 0, cond).contiguous() for k in counts}
ours = {"teachers", "students", "distill", "eval"} & {m.partition(".")[0] for m in sys.modules}
assert not ours, f"it imports {ours}"
save_file(samples, scratch / "samples")
"""


def export(
    generator: Generator, teacher: Teacher, path: Path, recipe: Mapping[str, Any]
) -> Generator:
    """Write the student to `path`; the student as it is in the folder, with its adapter merged.

    Raises:
        ExportError: another process cannot sample it, or its samples differ.
    """
    plain = merged(generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}-*"):  # of an export that was killed
        shutil.rmtree(stale, ignore_errors=True)
    draft = path.parent / f".{path.name}-{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        write(plain, teacher, draft)
        verify(draft, plain, teacher)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return plain.to(next(generator.parameters()).device)


def rehearse(generator: Generator, teacher: Teacher) -> None:
    """Before training, write the folder of the untrained student and sample from it.

    Raises:
        UserError: the folder could not be written or sampled, or the samples differ.
    """
    who = teacher_at(teacher.source)
    plain = merged(generator)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(plain, teacher, folder)
        cond = example_condition(teacher, SAMPLES)
        for steps in generator.counts:
            ours = tried_samples(plain, teacher, steps, cond)
            try:
                with imports_forgotten(), without_tf32():
                    theirs = sampler_file.sample(folder, SAMPLES, steps, 0, cond)
            except Exception as error:  # a part of the user's source that was not found
                raise UserError(
                    f"{who}: its student could not be sampled from its folder "
                    f"({type(error).__name__}: {first_line(error)}); define what the network's "
                    "class needs at the top of its file"
                ) from None
            if fault := difference(ours, theirs):
                kind = type(network_of(plain.denoiser).backbone).__name__
                raise UserError(
                    f"{who}: a student's folder {fault}; is an argument of {kind} no attribute of "
                    "it, or a buffer not persistent?"
                )


def tried_samples(generator: Generator, teacher: Teacher, steps: int, cond: Cond) -> Tensor:
    """The untrained student's samples.

    Raises:
        UserError: its network raises an exception, or they are not finite.
    """
    who = teacher_at(teacher.source)
    try:
        samples = samples_of(generator, teacher, steps, cond)
    except (Exception, SystemExit) as error:  # a user's own code may raise anything
        raise UserError(
            f"{who}: its student, whose weights are of float32, raised {type(error).__name__}: "
            f"{first_line(error)}; convert x_t to the dtype of the weights in call"
        ) from None
    if not samples.isfinite().all():
        times = ", ".join(f"{t:g}" for t in generator.at(steps).times)
        raise UserError(
            f"{who}: the untrained student's samples at t = {times} hold NaN or infinity; examine "
            "it with distill doctor, or set a lower student.start"
        )
    return samples


@contextmanager
def imports_forgotten() -> Iterator[None]:
    """Within it, modules are imported as if for the first time; afterwards they are as before."""
    before = set(sys.modules)
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n not in before and n.startswith("_")]:
            del sys.modules[name]


def write(generator: Generator, teacher: Teacher, folder: Path) -> None:
    """Write the folder's files.

    Args:
        generator: Without an adapter.
    """
    network = network_of(generator.denoiser)
    who = teacher_at(teacher.source)
    state = network.backbone.state_dict()
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    sources = sources_of(network, who)
    for name, text in sources.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copyfile(sampler_file.__file__, folder / "sampler.py")
    arguments = arguments_of(network.backbone, who)
    cond = example_condition(teacher, 1)
    config = {
        "file": sources.file,
        "module": sources.module,
        "class": type(network.backbone).__name__,
        "arguments": arguments.values,
        "tuples": arguments.tuples,
        "call": sources.call,
        "attributes": sources.attributes,
        "reads_cond": network.reads_cond,
        "shape": list(teacher.shape),
        "condition": entries_of(cond),
        "classes": teacher.codec.classes,
        "process": described(network.process),
        "predicts": prediction_of(network),
        "renoise": generator.renoise,
        "steps": sorted(generator.counts),
        "chains": {str(k): chain(generator, k) for k in sorted(generator.counts)},
        "teacher": teacher.source,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(page(config, sources.files), encoding="utf-8")
    open_to_readers(folder)


def chain(generator: Generator, steps: int) -> list[dict[str, float]]:
    """Of each call of the network: its time, scales and coefficients, as float32 has them."""
    student, network = generator.at(steps), network_of(generator.denoiser)
    x = torch.zeros(1)
    places = []
    for t in student.times:
        alpha, sigma = network.process.at(torch.tensor([t]), x)
        skip, out = network.coefficients(alpha, sigma)
        place = {"t": t, "alpha": alpha, "sigma": sigma, "c_skip": skip, "c_out": out}
        if network.share_times is not None:
            place["network_t"] = network.read_time(torch.tensor([t]))
        if student.renoise:
            place["noise"] = (sigma**2 - (alpha * student.floor) ** 2).sqrt()
        places.append({k: float(v) for k, v in place.items()})
    if not all(math.isfinite(v) for place in places for v in place.values()):
        raise UserError(
            f"student.start: what the network predicts gives no x̂ at t = {student.times[0]:g}, "
            "where α is 0; set a lower start, or take a process whose α stays above 0"
        )
    places[0]["start"] = float(student.scale(x))
    return places


def entries_of(cond: Cond) -> dict[str, Any] | None:
    """The shape of a sample's condition, and its type, by entry."""
    if cond is None:
        return None
    return {
        name: {"shape": list(entry.shape[1:]), "dtype": str(entry.dtype).removeprefix("torch.")}
        for name, entry in cond.items()
    }


def described(process: Process) -> dict[str, Any]:
    """A process by its name and settings, for people: the chains hold its values."""
    settings: dict[str, Any] = {}
    if is_dataclass(process) and not isinstance(process, type):
        # a user's own process may hold what JSON does not, such as a tensor
        settings = {k: v for k, v in asdict(process).items() if is_plain(v)}
    if isinstance(process, Tabulated):
        settings = {"indices": process.last + 1}
    return {"name": type(process).__name__, **settings}


def prediction_of(network: Network) -> str:
    """The key of what the network predicts; "custom" for a function of the user's own."""
    known = (k for k, v in PREDICTIONS.items() if v is network.coefficients)
    return next(known, "custom")


def page(config: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """The folder's README."""
    steps = ", ".join(map(str, config["steps"]))
    cond = ""
    if entries := config["condition"]:
        cond = ", cond={" + ", ".join(f'"{k}": …' for k in entries) + "}"
        shapes = "; ".join(f"`{k}`: {v['dtype']} {[16, *v['shape']]}" for k, v in entries.items())
        cond_line = f"\n`cond` has a row for each sample: {shapes}.\n"
    own = ", ".join(f"`{name}`" for name in files)
    return f"""# A few-step student of `{config["teacher"]}`

It samples tensors of shape {config["shape"]} in {steps} step(s):

```python
import sys

sys.path.insert(0, "this/folder")  # for sampler.py
from sampler import sample

x = sample("this/folder", 16, steps={max(config["steps"])}, seed=0{cond})
```
{cond_line if cond else ""}
| file | contents |
|---|---|
| `model.safetensors` | the weights; an adapter is merged into them |
| `config.json` | times, scales and coefficients of every step; the network's arguments |
| `sampler.py` | the sampler; it needs torch and safetensors alone |
| {f"{own}" if own else "`" + config["module"] + "`"} | the class `{config["class"]}`: {"a copy of the network's own source" if own else "it comes with an installed package"} |

Samples are what the network was trained on, before any decoding by the teacher's codec.
"""  # noqa: E501


def verify(folder: Path, generator: Generator, teacher: Teacher) -> None:
    """Compare samples that another process draws from the folder with the student's, on the CPU.

    Raises:
        ExportError: they differ by more than rounding, or the process fails.
    """
    cond = example_condition(teacher, SAMPLES)
    with TemporaryDirectory() as scratch:
        place = Path(scratch)
        if cond is not None:
            save_tensors({k: v.cpu().contiguous() for k, v in cond.items()}, place / "cond")
        job = json.dumps([SAMPLES, list(generator.counts)])
        command = [sys.executable, "-IB", "-c", SCRIPT, str(folder.resolve()), scratch, job]
        environment = child_environment() | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        result = subprocess.run(
            command, cwd=scratch, capture_output=True, text=True, env=environment
        )
        if result.returncode:
            lines = [v.strip() for v in result.stderr.splitlines() if v.strip()] or ["no message"]
            error = ExportError(f"another process could not sample the folder: {lines[-1]}")
            error.add_note(result.stderr[-20_000:])
            raise error
        theirs = load_file(place / "samples")
    for steps in generator.counts:
        if fault := difference(samples_of(generator, teacher, steps, cond), theirs[str(steps)]):
            raise ExportError(f"at {steps} steps the student's folder {fault}")


def samples_of(generator: Generator, teacher: Teacher, steps: int, cond: Cond) -> Tensor:
    """The student's own samples for seed 0."""
    with without_tf32():
        return sample_student(generator.at(steps), teacher, [0] * SAMPLES, 0, cond=cond)


def difference(ours: Tensor, theirs: Tensor) -> str:
    """How samples differ by more than rounding; empty if they do not."""
    if ours.shape != theirs.shape:
        return f"gives samples {tuple(theirs.shape)}, and the student gives {tuple(ours.shape)}"
    gap = (ours - theirs).abs().max().item() / max(1.0, ours.abs().max().item())
    if gap <= TOLERANCE:
        return ""
    return f"gives other samples than the student, by {gap:.2g}; at most {TOLERANCE:g} is rounding"


@torch.no_grad()
def merged(generator: Generator) -> Generator:
    """The student on the CPU as a network of plain layers: its adapter is added to the weights."""
    adapter = adapter_of(generator.denoiser)
    view = view_of(network_of(generator.denoiser))
    view.backbone = deepcopy(view.backbone).cpu().requires_grad_(False).eval()
    if adapter is not None and adapter.name is not None:
        merge(view.backbone, adapter.name)
    twin = copy(generator)
    twin._modules = {"denoiser": view}
    return twin


def merge(backbone: nn.Module, name: str) -> None:
    """Put plain layers in the place of those with adapters, in place, with one adapter added."""
    adapted = set(adapter_layers(backbone))
    for path, module in list(backbone.named_modules()):
        if module not in adapted:
            continue
        layer: Any = module
        base = layer.base_layer
        if name in adapter_names(module):
            base.weight = nn.Parameter(merged_weight(layer, name), requires_grad=False)
        parent, _, leaf = path.rpartition(".")
        setattr(backbone.get_submodule(parent), leaf, base)
