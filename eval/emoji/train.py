"""Train the two networks that read emoji: concept, style, and features.

    python -m eval.emoji.train emoji.npz OUT --reader a [--steps 6000] [--batch 128] [--start FILE]

On one CPU core in hours, on a GPU in minutes; a killed run goes on from its last saved state. For
the first 60 % of the steps a reader sees the training cells alone, and its figures on the held-out
cells, which it has never seen, are taken then. Afterwards it learns all cells: it is a ruler for
models that never saw them. OUT gets `reader-a.safetensors`, in half precision, with these figures
in its header.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from eval.emoji.grid import Grid, draw, load
from eval.emoji.networks import ConvNeXt, Reader, ResNet

KINDS: dict[str, Callable[[int, int], Reader]] = {"a": ResNet, "b": ConvNeXt}
RATES = {"a": 3e-3, "b": 1.5e-3}  # AdamW's
SEEN = 0.6  # the share of the steps without the held-out cells
DECAY = 0.995  # of the average of the weights
SAVED_EVERY = 200  # steps


def spoil(x: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] with changes of random strength.

    Contrast, colour, blur, noise, and a grey square: a reader should not rest on what generated
    pictures get slightly wrong.
    """
    n, device = len(x), x.device
    u = torch.rand(6, n, 1, 1, 1, device=device)
    x = 1 - (1 - x) * (0.75 + 0.4 * u[0])
    tint = 1 - (1 - x) * (1 + 0.3 * (torch.rand(n, 3, 1, 1, device=device) - 0.5))
    x = torch.where(u[1] < 0.5, tint, x)
    soft = avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = torch.where(u[2] < 0.3, soft, x)
    x = x + 0.25 * u[3] * (u[3] < 0.5) * torch.randn_like(x)
    place = torch.arange(x.shape[-1], device=device)
    corner = torch.randint(-8, 56, (2, n, 1), device=device)
    inside = (place >= corner) & (place < corner + 18)
    hole = (inside[0, :, None, :, None] & inside[1, :, None, None, :]) & (u[4] < 0.4)
    return torch.where(hole, 2 * u[5] - 1, x).clamp(-1.2, 1.2)


@torch.no_grad()
def accuracy(network: Reader, grid: Grid, index: Tensor) -> dict[str, float]:
    """Shares of draws of these cells whose concept, concept in the five best, and style are right.

    Args:
        index: Cells, (N,).
    """
    x = draw(
        grid.pictures[index], grid.mirrors[index], torch.Generator(index.device).manual_seed(5)
    )
    return judged(network, x, grid.concept[index], grid.style[index])


@torch.no_grad()
def judged(network: Reader, x: Tensor, concept: Tensor, style: Tensor) -> dict[str, float]:
    """The same of pictures x (N, 3, 64, 64) with the concepts and styles that they should show."""
    outs = [network(part) for part in x.split(250)]
    concepts, styles = (torch.cat([o[k].float() for o in outs]) for k in (0, 1))
    best = concepts.topk(5, 1).indices == concept[:, None]
    return {
        "concept": best[:, 0].double().mean().item(),
        "concept_top5": best.any(1).double().mean().item(),
        "style": (styles.argmax(1) == style).double().mean().item(),
    }


class Training:
    """A reader, its optimiser, the average of its weights, and the step."""

    def __init__(self, kind: str, grid: Grid, steps: int) -> None:
        torch.manual_seed(0)
        self.kind, self.steps, self.step = kind, steps, 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.grid = grid = grid.to(self.device)
        self.network = KINDS[kind](len(grid.concepts), len(grid.styles)).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), RATES[kind], (0.9, 0.99), weight_decay=0.05
        )
        self.mean = {k: v.clone() for k, v in self.network.state_dict().items()}
        self.facts: dict[str, Any] = {}
        self.train = (~grid.held_out).nonzero()[:, 0]
        self.held = grid.held_out.nonzero()[:, 0]

    def advance(self, batch: int) -> Tensor:
        """One step; its loss, on the device."""
        torch.manual_seed(self.step)
        cells = (
            self.train
            if self.step < SEEN * self.steps
            else torch.arange(len(self.grid.style), device=self.device)
        )
        index = cells[torch.randint(len(cells), (batch,), device=self.device)]
        x = spoil(draw(self.grid.pictures[index], self.grid.mirrors[index]))
        concept, style = self.network(x)
        loss = cross_entropy(concept, self.grid.concept[index], label_smoothing=0.1)
        loss = loss + 0.5 * cross_entropy(style, self.grid.style[index])
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        half = 0.5 + 0.5 * math.cos(math.pi * self.step / self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = RATES[self.kind] * min((self.step + 1) / 200, 1) * max(half, 1e-3)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        for key, value in self.network.state_dict().items():
            if value.is_floating_point():
                self.mean[key].lerp_(value, 1 - min(DECAY, (1 + self.step) / (10 + self.step)))
        return loss.detach()

    def averaged(self) -> Reader:
        """A reader with the averaged weights, for use."""
        reader = KINDS[self.kind](len(self.grid.concepts), len(self.grid.styles))
        reader.load_state_dict(self.mean)
        return reader.to(self.device).eval()

    def measure(self) -> None:
        """Add the figures on cells that the reader has not seen, once; then those at the end."""
        if self.step >= SEEN * self.steps and "held_out_cells_unseen" not in self.facts:
            self.facts["held_out_cells_unseen"] = accuracy(self.averaged(), self.grid, self.held)
        if self.step >= self.steps:
            reader = self.averaged()
            self.facts["held_out_cells"] = accuracy(reader, self.grid, self.held)
            self.facts["train_cells"] = accuracy(reader, self.grid, self.train[::4])

    def tensors(self) -> dict[str, Tensor]:
        moments = self.optimizer.state_dict()["state"]
        flat = {f"moments.{i}.{k}": torch.as_tensor(v) for i, s in moments.items()
                for k, v in s.items()}  # fmt: skip
        flat |= {f"network.{k}": v for k, v in self.network.state_dict().items()}
        flat |= {f"mean.{k}": v for k, v in self.mean.items()}
        return {k: v.contiguous() for k, v in flat.items()}

    def save(self, path: Path) -> None:
        """Write the whole state; a kill leaves the old file or the new one."""
        facts = {"step": str(self.step), "facts": json.dumps(self.facts)}
        save_file(self.tensors(), path.with_suffix(".draft"), facts)
        path.with_suffix(".draft").replace(path)

    def restore(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            header = file.metadata()
        flat = load_file(path)
        part = lambda name: {k.removeprefix(name): v for k, v in flat.items()  # noqa: E731
                             if k.startswith(name)}  # fmt: skip
        self.network.load_state_dict(part("network."))
        self.mean = {k: v.to(self.device) for k, v in part("mean.").items()}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part("moments.").items():
            i, name = key.split(".")
            state.setdefault(int(i), {})[name] = value
        tree = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**tree, "state": state})
        self.step, self.facts = int(header["step"]), json.loads(header["facts"])


def write(training: Training, path: Path) -> None:
    """Write the averaged weights in half precision, with the figures in the header."""
    half = {k: (v.half() if v.is_floating_point() else v).cpu() for k, v in training.mean.items()}
    save_file(half, path, {"figures": json.dumps(training.facts), "steps": str(training.step)})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--reader", choices=sorted(KINDS), required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    training = Training(args.reader, load(args.data), args.steps)
    state = args.out / f"state-{args.reader}.safetensors"
    if state.exists():
        training.restore(state)
    while training.step < args.steps:
        loss = training.advance(args.batch)
        if training.step % SAVED_EVERY == 0 or training.step == args.steps:
            training.measure()
            training.save(state)
            sys.stdout.write(f"{training.step} {loss.item():.3f} {json.dumps(training.facts)}\n")
            sys.stdout.flush()
    write(training, args.out / f"reader-{args.reader}.safetensors")


if __name__ == "__main__":
    main()
