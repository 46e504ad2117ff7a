"""What stock pipelines feed their networks, beside what our denoisers feed them."""

from __future__ import annotations

from inspect import signature

import torch
from torch import Tensor

from students.export.folder import request
from students.schedulers import student
from teachers.process import Linear

LONGEST = (".encoder_hidden_states", ".encoder_hidden_states_mask", ".text_bth")


def flat(value, name=""):
    """The tensors and shapes among a call's arguments, by name."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}.{i}").items()}
    return {name: value} if type(value) is int else {}


def spy(network, seen):
    """Append to `seen` what each call of the network is given."""
    bind = signature(type(network).forward).bind

    def note(module, args, kwargs):
        given = dict(bind(module, *args, **kwargs).arguments)
        seen.append((next(v for k, v in given.items() if k != "self"), flat(given)))

    return network.register_forward_pre_hook(note, with_kwargs=True)


def stock_calls(teacher, height, width, monkeypatch):
    """What the teacher's own pipeline feeds its network for pictures of this size: prompts, calls,
    and the scheduler's time of each."""
    pipe, times = teacher.codec.pipe, []
    pipe.set_progress_bar_config(disable=True)
    prompts, arguments = request(student(teacher), teacher)
    step = pipe.scheduler.step

    def note(out, t, *args, **kwargs):
        times.append(float(t))
        return step(out, t, *args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", note)
    calls = []
    hook = spy(teacher.denoiser.backbone, calls)
    arguments |= {"height": height, "width": width}
    pipe(**arguments, num_inference_steps=2, output_type="latent")
    hook.remove()
    return prompts, calls, times


def time_of(teacher, index):
    """The process's time (1,) at the index that a scheduler hands to its network."""
    process = teacher.denoiser.process
    if isinstance(process, Linear):
        units = teacher.denoiser.schedule.config["num_train_timesteps"]
        sigma = torch.tensor([index / units], dtype=torch.float64)
        return process.time(sigma / (1 - sigma)).float()
    return torch.tensor([index / process.last])


def check(teacher, height, width, monkeypatch):
    """Our denoiser feeds the network what its pipeline does, at this size."""
    network = teacher.denoiser
    prompts, calls, times = stock_calls(teacher, height, width, monkeypatch)
    cond = teacher.codec.condition(prompts)
    channels, *frames, _, _ = teacher.shape
    shape = (channels, *frames, height // network.per_latent, width // network.per_latent)
    assert len(calls) == len(times) >= 2
    for (x_t, theirs), index in zip(calls, times, strict=True):
        if isinstance(x_t, list):  # one by one, each a video of one frame
            x_t = torch.stack(x_t).squeeze(2)
        if teacher.codec.pictures:  # the picture comes after the noise, in channels or in tokens
            x_t = x_t[:, : network.pack(torch.zeros(1, *shape)).shape[1]]
        seen = []
        hook = spy(network.backbone, seen)
        with torch.no_grad():
            network(network.unpack(x_t, shape), time_of(teacher, index).expand(len(prompts)), cond)
        hook.remove()
        ((_, ours),) = seen
        masked = len(frames) == 0 and ".encoder_hidden_states_mask" in theirs
        for key in LONGEST if masked or ".text_bth" in theirs else ():
            if key in theirs:  # as long as the longest prompt, ours as the longest allowed
                ours[key] = ours[key][:, : theirs[key].shape[1]]
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, int):
                assert ours[key] == value, key
                continue
            gap = (ours[key].double() - value.double()).abs() / (1 + value.double().abs())
            assert gap.max() < 1e-5, key
    return theirs
