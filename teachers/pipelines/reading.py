"""What a stock pipeline feeds its network, read from a run of its own.

The run costs no call of the network (see `recording.py`). Each argument of the network must be the
latents, the time, a result of `encode_prompt`, or the same for every prompt and time. A pipeline of
which anything else is seen is refused, and the message names it.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from teachers.errors import UserError, first_line
from teachers.pipelines.generic import Patches, Plain, Tokens, middle_of
from teachers.pipelines.recording import Recording, record

PROMPTS = ["a", "a red circle on two blue squares", "it"]
OTHERS = ["two boats", "b"]
LAYOUTS: tuple[Any, ...] = (Plain, Patches, Tokens)


def read_pipeline(
    pipe: Any, part: str, size: int | None, who: str
) -> tuple[Any, dict[str, Any], Recording]:
    """The layout of a pipeline's latents, the declarations of `Unseen`, and the run they are from.

    Args:
        part: The component that is the network.
        size: Image side in pixels; None: the pipeline's own.
        who: Begins an error's message.

    Raises:
        UserError: something that the pipeline does is not recognised.
    """
    unguided, recording = _run(pipe, part, size, who)
    # whether a scheduler's step gets the generator depends on its signature in these pipelines
    seeded = recording.seeded or hasattr(pipe, "prepare_extra_step_kwargs")
    found: dict[str, Any] = {"UNGUIDED_CALL": unguided, "SEEDED": seeded}
    layout = _latents(recording, found, who)
    found["PER_CELL"] = _per_cell(pipe, part, found, size, who)
    _time(recording, found, pipe.scheduler, who)
    _prompts(pipe, recording, found, who)
    _constants(pipe, part, recording, found, size, who)
    _prediction(recording, found, who)
    _grid(pipe.scheduler, recording, found, who)
    found["LORA"] = _layers(getattr(pipe, part), part, who)
    return layout, found, recording


def refusal(who: str, fault: str) -> UserError:
    return UserError(
        f"{who} is not supported, and the generic adapter does not recognise it: {fault}; write an "
        "adapter, as docs/teachers.md says, and check it with distill doctor"
    )


def _run(pipe: Any, part: str, size: int | None, who: str) -> tuple[dict[str, Any], Recording]:
    """The arguments under which the pipeline does not guide, and a recording of such a run."""
    known = inspect.signature(pipe.__call__).parameters
    for name in ("prompt", "height", "width"):
        if name not in known:
            raise refusal(who, f"its __call__ has no argument {name}")
    if getattr(pipe, "vae", None) is None or not hasattr(pipe, "encode_prompt"):
        raise refusal(who, "it has no vae or no encode_prompt")
    faults: list[str] = []
    for scale in (1.0, 0.0):
        guidance = {"guidance_scale": scale, "true_cfg_scale": 1.0}
        unguided = {k: v for k, v in guidance.items() if k in known}
        for widen in (1, 2):
            try:
                recording = record(pipe, part, {**unguided, **_request(PROMPTS, size)}, widen)
            except Exception as error:  # whatever an unknown pipeline needs
                faults.append(f"its run raises {type(error).__name__}: {first_line(error)}")
                continue
            if not (fault := _strange(recording)):
                return unguided, recording
            faults.append(fault)
    raise refusal(who, faults[0])


def _strange(recording: Recording) -> str:
    """What is not plain sampling in a run; empty if nothing is."""
    if not recording.steps or len(recording.calls) != len(recording.steps):
        return "its network is not called once for each step of its scheduler"
    samples = len(next(v for v in recording.calls[0].values() if isinstance(v, Tensor)))
    many = samples != len(PROMPTS)
    return "its network is called with several samples for each prompt" if many else ""


def _request(prompts: list[str], size: int | None) -> dict[str, Any]:
    sides = {} if size is None else {"height": size, "width": size}
    return {"prompt": [*prompts], **sides}


def _latents(recording: Recording, found: dict[str, Any], who: str) -> Any:
    """The layout of latents, and the argument that they are."""
    x = recording.steps[0][2]
    names = [k for k, v in recording.calls[0].items() if same(v, x)]
    if not names:
        raise refusal(who, "no argument of its network is the scheduler's sample as it is")
    found["INPUT"] = names[0]
    for layout in LAYOUTS:
        for shape in _shapes(layout, x):
            noise = torch.randn(len(x), *shape, generator=torch.Generator().manual_seed(0))
            if same(layout.pack(noise), x):
                found["SHAPE"] = shape
                return layout
    raise refusal(who, f"noise becomes latents of {tuple(x.shape[1:])} in no known way")


def _per_cell(pipe: Any, part: str, found: dict[str, Any], size: int | None, who: str) -> int:
    """Pixels per latent cell along one side, from a run of a known size."""
    side, cells, factor = size, found["SHAPE"][-1], getattr(pipe, "vae_scale_factor", 8)
    if side is None:
        side = cells * factor
        arguments = {**found["UNGUIDED_CALL"], **_request(PROMPTS, side)}
        x = record(pipe, part, arguments, most=1).calls[0][found["INPUT"]]
        cells = math.isqrt(x[0].numel() // math.prod(found["SHAPE"][:-2]))
    if side not in (cells * factor, 2 * cells * factor):
        raise refusal(who, f"for {side} pixels it samples latents of {cells} cells")
    return side // cells


def _shapes(layout: Any, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes (C, H, W) of squares that this layout would make latents of x's shape from."""
    if layout is Plain:
        return [tuple(x.shape[1:])] if x.ndim == 4 else []
    if x.ndim != 3 or (side := math.isqrt(x.shape[1])) ** 2 != x.shape[1]:
        return []
    if layout is Tokens:
        return [(x.shape[2], side, side)]
    return [(x.shape[2] // 4, 2 * side, 2 * side)] if x.shape[2] % 4 == 0 else []


def same(a: Any, b: Any) -> bool:
    """Whether both are tensors of one shape and nearly the same values."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape:
        return False
    return torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5)


def _time(recording: Recording, found: dict[str, Any], scheduler: Any, who: str) -> None:
    """The argument that is time, and its units."""
    last = scheduler.config.num_train_timesteps
    pairs = [(c, i) for c, (_, i, _, _) in zip(recording.calls, recording.steps, strict=True)]
    for name, value in recording.calls[0].items():
        if not isinstance(value, Tensor) or value.numel() not in (1, len(PROMPTS)):
            continue
        values = [float(c[name].float().mean()) for c, _ in pairs]
        for units in (1.0, 1000.0, float(last)):
            for backwards in (False, True):
                expected = [(units - i if backwards else i) / units for _, i in pairs]
                close = all(
                    math.isclose(v, e, rel_tol=1e-4, abs_tol=1e-5)
                    for v, e in zip(values, expected, strict=True)
                )
                if close and max(values) > min(values):
                    found |= {"CLOCK": (name, units), "REVERSED": backwards}
                    return
    raise refusal(who, "no argument of its network is the scheduler's index in known units")


def _prompts(pipe: Any, recording: Recording, found: dict[str, Any], who: str) -> None:
    """Which arguments are results of encode_prompt, and what that is called with."""
    if len(recording.encodings) != 1:
        raise refusal(who, f"it calls encode_prompt {len(recording.encodings)} times")
    given, results = recording.encodings[0]
    name = next((k for k, v in given.items() if isinstance(v, list) and v == PROMPTS), None)
    if name is None:
        raise refusal(who, "encode_prompt is not given the prompts as a list")
    found |= {"PROMPT": name, "CALL": {k: v for k, v in given.items() if k != name}}
    results = listed(results)
    encoded = _encoded(recording.calls[0], results, {found["INPUT"], found["CLOCK"][0]})
    if not encoded:
        raise refusal(who, "no argument of its network is a result of encode_prompt")
    booleans = {k for k, i in encoded.items() if results[i].dtype == torch.bool}
    found |= {"ENCODED": encoded, "BOOLEAN": frozenset(booleans)}
    short = listed(pipe.encode_prompt(**{**found["CALL"], name: ["a"]}))
    for key, i in encoded.items():
        if short[i].shape[1:] != results[i].shape[1:]:
            raise refusal(who, f"{key} is as long as the longest prompt of a batch")


def _encoded(call: dict[str, Any], results: list[Any], taken: set[str]) -> dict[str, int]:
    """The arguments that are results of encode_prompt, by their index, and differ by prompt."""
    encoded = {}
    for key, value in call.items():
        if key in taken or not _is_batched(value, len(PROMPTS)):
            continue
        places = [i for i, result in enumerate(results) if same(value, result)]
        if places and not equal_rows(value):
            encoded[key] = places[0]
    return encoded


def listed(results: Any) -> list[Any]:
    """The results of encode_prompt, one or several, as a list."""
    return [results] if isinstance(results, Tensor) else list(results)


def equal_rows(value: Tensor) -> bool:
    """Whether every sample has the same."""
    return bool((value == value[:1]).all())


def _constants(
    pipe: Any, part: str, recording: Recording, found: dict[str, Any], size: int | None, who: str
) -> None:
    """The other arguments, which neither time nor prompts change."""
    arguments = {**found["UNGUIDED_CALL"], **_request(OTHERS, size)}
    other = record(pipe, part, arguments, most=1).calls[0]
    taken = {found["INPUT"], found["CLOCK"][0], *found["ENCODED"]}
    fixed, each = {}, {}
    for key, value in recording.calls[0].items():
        if key in taken or key in ("self", "return_dict"):
            continue
        if any(not _equal(call.get(key), value) for call in recording.calls[1:]):
            raise refusal(who, f"{key} changes from step to step and is no known form of time")
        if _equal(other.get(key), value):
            fixed[key] = value
        elif _is_batched(value, len(PROMPTS)) and _is_batched(other.get(key), len(OTHERS)):
            if not equal_rows(value) or not _equal(value[:1], other[key][:1]):
                raise refusal(who, f"{key} depends on the prompt and is no result of encode_prompt")
            each[key] = value[:1]
        else:
            raise refusal(who, f"{key} depends on the prompts of the batch in no known way")
    found |= {"FIXED": fixed, "EACH": each}


def _is_batched(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == count


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def _prediction(recording: Recording, found: dict[str, Any], who: str) -> None:
    """What the pipeline makes of the network's output before its scheduler reads it."""
    pairs = list(zip(recording.outputs, recording.steps, strict=True))
    for sign in (1, -1):
        # a learned variance, behind the prediction, is left out
        if all(same(sign * out[:, : given.shape[1]], given) for out, (given, *_) in pairs):
            found["SIGN"] = sign
            return
    raise refusal(who, "its scheduler is not given the network's output, nor that negated")


def _grid(scheduler: Any, recording: Recording, found: dict[str, Any], who: str) -> None:
    """How the pipeline sets its times, and its shift."""
    if len(recording.timesteps) != 1:
        raise refusal(who, "it sets its scheduler's times more than once")
    (given,) = recording.timesteps
    sigmas, count = given.get("sigmas"), len(recording.steps)
    if given.get("timesteps") is not None:
        raise refusal(who, "it gives its scheduler timesteps of its own")
    if sigmas is not None:
        trailing = torch.linspace(1, 1 / count, count)
        if not same(torch.as_tensor(sigmas).float(), trailing):
            raise refusal(who, "it gives its scheduler other sigmas than 1 to 1/n in equal steps")
        found["GRID"] = "trailing"
    if scheduler.config.get("use_dynamic_shifting") and (mu := given.get("mu")) is not None:
        linear = scheduler.config.get("time_shift_type") == "linear"
        found["SHIFT"] = float(mu) if linear else math.exp(float(mu))


def _layers(backbone: nn.Module, part: str, who: str) -> str:
    """The layers that get adapters: attention's projections in the repeated blocks, or else all."""
    linear = [n for n, m in backbone.named_modules() if isinstance(m, nn.Linear)]
    inside = [n for n in linear if any(place.isdigit() for place in n.split(".")[:-1])]
    ends = (".to_q", ".to_k", ".to_v", ".to_out.0")
    chosen = [n for n in inside if n.endswith(ends)] or inside
    try:
        known = bool(chosen) and bool(part == "unet" or middle_of(backbone))
    except IndexError:
        known = False
    if not known:
        raise refusal(who, "its network has no list of blocks with linear layers")
    return rf"(.*\.)?({'|'.join(n.replace('.', '[.]') for n in chosen)})"
