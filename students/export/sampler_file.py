"""Samples of the few-step network in this folder. It needs torch and safetensors, and no more.

    from sampler import sample
    x = sample("path/to/this/folder", 16, steps=4, seed=0)

config.json has, for each step count, the time t of every call of the network, the scales α and σ of
the noise there, and the c_skip and c_out by which the network's output F becomes the data that it
expects behind x_t: x = c_skip x_t + c_out F. The network reads network_t, where there is one.
"""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file


def read_module(path):
    """The module in a file, which may import the files beside it."""
    beside = {p.stem for p in path.parent.glob("*.py")}
    others = {k: sys.modules.pop(k) for k in beside & sys.modules.keys()}  # of other folders
    name = f"_{path.stem}_{abs(hash(str(path)))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
        for k in beside:
            sys.modules.pop(k, None)
        sys.modules.update(others)
    return module


def load(folder, device="cpu"):
    """The network as a function of (x_t, t, cond, s), and what config.json holds."""
    folder = Path(folder).resolve()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["file"] is None:  # a class of an installed package
        module = importlib.import_module(config["module"])
    else:
        module = read_module(folder / config["file"])
    tuples = {k: tuple(config["arguments"][k]) for k in config["tuples"]}
    network = getattr(module, config["class"])(**{**config["arguments"], **tuples})
    weights = load_file(folder / "model.safetensors")
    network.load_state_dict(weights, assign=True)  # keeps the weights' precision
    network = network.to(device).eval().requires_grad_(False)
    if config["call"] is None:
        reads = config["reads_cond"]
        return lambda x, t, cond, s: network(x, t, cond) if reads else network(x, t), config
    call = read_module(folder / config["call"]).call
    this = SimpleNamespace(backbone=network, **config["attributes"])
    return lambda x, t, cond, s: call(this, x, t, cond, s), config


def checked(cond, n, wanted, device):
    """The condition on the device, if it is what the network was trained with."""
    if cond is None and not wanted:
        return None
    if not isinstance(cond, dict) or set(cond) != set(wanted or {}):
        entries = {k: f"{v['dtype']} {[n, *v['shape']]}" for k, v in (wanted or {}).items()}
        raise ValueError(f"cond: expected {entries or None}")
    for name, entry in cond.items():
        dims, dtype = 1 + len(wanted[name]["shape"]), getattr(torch, wanted[name]["dtype"])
        same = torch.is_tensor(entry) and entry.is_floating_point() == dtype.is_floating_point
        if not same or entry.ndim != dims or len(entry) != n:
            raise ValueError(f"cond: {name!r} must be {dtype}, with {dims} axes and {n} rows")
    return {k: v.to(device) for k, v in cond.items()}


@torch.no_grad()
def sample(folder, n, steps=None, seed=0, cond=None, device="cpu"):
    """n samples (n, ...) in `steps` steps, by default the most; cond holds tensors of n rows."""
    network, config = load(folder, device)
    steps = max(config["steps"]) if steps is None else steps
    if n < 1 or steps not in config["steps"]:
        raise ValueError(f"n, steps: {n}, {steps}; n is 1 or more, steps one of {config['steps']}")
    cond = checked(cond, n, config["condition"], device)
    draw = torch.Generator().manual_seed(seed)  # on the CPU, so that every device has its noise
    noise = lambda: torch.randn(n, *config["shape"], generator=draw).to(device)  # noqa: E731
    chain, renoise = config["chains"][str(steps)], config["renoise"]
    x = x_t = noise() * chain[0]["start"]
    for now, then in zip(chain, [*chain[1:], None]):
        t = torch.full((n,), now.get("network_t", now["t"]), device=device)
        s = torch.full_like(t, 0.0 if renoise or then is None else then["t"])
        f = network(x_t, t, cond, s).float()[:, : x_t.shape[1]]  # without a learned variance
        x = now["c_skip"] * x_t + now["c_out"] * f
        if then is None:
            break
        if renoise:
            x_t = then["alpha"] * x + then["noise"] * noise()
        else:
            x_t = then["alpha"] * x + then["sigma"] * ((x_t - now["alpha"] * x) / now["sigma"])
    return x
