"""A run of a stock pipeline whose network and VAE only note what they are given.

It costs the encoding of the prompts and nothing else, whatever the network's size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from teachers.storage.components import quiet


@dataclass
class Recording:
    """What a pipeline did.

    Args:
        calls: The network's arguments by name, at each call.
        outputs: What the network answered.
        steps: Prediction, index and sample of each scheduler step, and the sample after it.
        seeded: The scheduler was given the pipeline's generator.
        encodings: Arguments and results of each call of encode_prompt.
        timesteps: The arguments of set_timesteps, at each call.
        decoded: What the VAE was given; None if the run ended before.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    steps: list[tuple[Tensor, float, Tensor, Tensor]] = field(default_factory=list)
    seeded: bool = False
    encodings: list[tuple[dict[str, Any], Any]] = field(default_factory=list)
    timesteps: list[dict[str, Any]] = field(default_factory=list)
    decoded: Tensor | None = None


class Enough(Exception):
    """Ends a run of which no more is needed."""


class Answer(tuple[Tensor]):
    """A network's output in both forms that pipelines read: a tuple, and the field `sample`."""

    @property
    def sample(self) -> Tensor:
        return self[0]


class Probe:
    """Stands for a network: notes its arguments, and answers with noise.

    Args:
        widen: How many channels it answers for each that it is given.
        most: How many calls end the run; None lets it go on.
    """

    def __init__(self, network: Any, into: Recording, widen: int, most: int | None) -> None:
        self.network, self.into, self.widen, self.most = network, into, widen, most
        self.signature = inspect.signature(network.forward)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Answer:
        given = dict(self.signature.bind(*args, **kwargs).arguments)
        self.into.calls.append(given)
        if self.most is not None and len(self.into.calls) >= self.most:
            raise Enough
        x = next(v for v in given.values() if isinstance(v, Tensor))
        shape = (x.shape[0], x.shape[1] * self.widen, *x.shape[2:])
        rng = torch.Generator().manual_seed(len(self.into.calls))
        out = torch.randn(shape, generator=rng).to(x)
        self.into.outputs.append(out)
        return Answer((out,))


def record(
    pipe: Any, part: str, arguments: dict[str, Any], widen: int = 1, most: int | None = None
) -> Recording:
    """Run the pipeline, with its noise from seed 0.

    Args:
        part: The component that is the network.
        arguments: For the pipeline; the number of steps is its own default.
        widen, most: As `Probe` has them.
    """
    into = Recording()
    with ExitStack() as stack:
        stack.enter_context(quiet())
        probe = Probe(getattr(pipe, part), into, widen, most)
        stack.enter_context(replaced(pipe, part, probe))
        for thing, name, note in (
            (pipe.scheduler, "step", _note_step),
            (pipe.scheduler, "set_timesteps", _note_timesteps),
            (pipe, "encode_prompt", _note_encoding),
            (pipe.vae, "decode", _note_decoding),
        ):
            own = getattr(thing, name)
            stack.enter_context(replaced(thing, name, wraps(own)(note(own, into))))
        stack.enter_context(torch.no_grad())
        stack.enter_context(replaced(pipe, "progress_bar", lambda *args, **kwargs: _Bar()))
        with suppress(Enough):
            pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="pt")
    return into


class _Bar:
    """A progress bar that shows nothing."""

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, *args: Any) -> None:
        pass


@contextmanager
def replaced(thing: Any, name: str, value: Any) -> Iterator[None]:
    """Within it, an attribute of the object is another, past its own __setattr__."""
    attributes = vars(thing)
    before = attributes.get(name, Enough)
    modules = getattr(thing, "_modules", {})
    held = modules.pop(name, None)
    attributes[name] = value
    try:
        yield
    finally:
        del attributes[name]
        if before is not Enough:
            attributes[name] = before
        if held is not None:
            modules[name] = held


def _note_step(own: Any, into: Recording) -> Any:
    def step(out: Tensor, t: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        into.seeded = into.seeded or kwargs.get("generator") is not None
        made = own(out, t, x, *args, **kwargs)
        after = made[0] if isinstance(made, tuple) else made.prev_sample
        into.steps.append((out.clone(), float(t), x.clone(), after.clone()))
        return made

    return step


def _note_timesteps(own: Any, into: Recording) -> Any:
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        into.timesteps.append(dict(inspect.signature(own).bind(*args, **kwargs).arguments))
        return own(*args, **kwargs)

    return set_timesteps


def _note_encoding(own: Any, into: Recording) -> Any:
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        given = dict(inspect.signature(own).bind(*args, **kwargs).arguments)
        results = own(*args, **kwargs)
        into.encodings.append((given, results))
        return results

    return encode_prompt


def _note_decoding(own: Any, into: Recording) -> Any:
    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        into.decoded = latents.clone()
        raise Enough

    return decode
