"""Measure the engine's step against the bare cost of its networks, for each objective.

    python benchmarks/overhead.py [--network digits|5m|both] [--json FILE]

A bare step runs exactly the forward and backward passes of the objective, in the same process: it
adds no noise, computes no loss, averages and clips nothing, logs nothing. The ratio is the median
over rounds that alternate both, since a shared machine's speed drifts. The memory ratio is
(state + peak of an engine step) / (state + peak of a bare step), where the state is weights, their
average and optimizer moments, and a peak is what the step allocates on top.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distill.config.recipe import Recipe
from distill.data.stream import Stream
from distill.training import build
from distill.training.engine import Engine

FIVE = ("dmd2", "sid", "fdistill", "consistency", "progressive")
LARGE = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "block_out_channels": (64, 112, 160),
    "layers_per_block": 1, "down_block_types": ("DownBlock2D",) * 3,
    "up_block_types": ("UpBlock2D",) * 3, "norm_num_groups": 16, "num_class_embeds": 11,
    "attention_head_dim": 32,
}  # fmt: skip


def teacher(kind: str, root: Path) -> str:
    """The shipped digits teacher, or a random one with five million parameters."""
    if kind == "digits":
        return "digits"
    import diffusers

    unet = diffusers.UNet2DModel(**LARGE)
    pipe = diffusers.ConsistencyModelPipeline(unet=unet, scheduler=diffusers.EDMEulerScheduler())  # pyright: ignore
    pipe.save_pretrained(root / kind)
    return str(root / kind)


def images(root: Path) -> str:
    """A folder of 64 random images in ten class folders, for the random teacher."""
    from torchvision.utils import save_image

    for i in range(64):
        folder = root / "images" / str(i % 10)
        folder.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 32, 32), folder / f"{i}.png")
    return str(root / "images")


def engine_of(name: str, kind: str, root: Path, batch: int) -> Engine:
    """The engine of a run of this objective on this teacher."""
    tree: dict[str, Any] = {
        "teacher": {"source": teacher(kind, root), "null_label": 10},
        "objective": {"name": name},
        "data": {"source": "digits" if kind == "digits" else images(root)},
        "train": {"steps": 10**6, "batch": batch, "log_every": 10**6, "save_every": 10**6,
                  "sample_every": 0},
    }  # fmt: skip
    if name in ("dmd2", "fdistill"):
        tree["critic"] = {}
        tree["objective"]["student_every"] = 2
    if name == "progressive":
        tree["objective"]["stage_steps"] = 10**6
    return build.build(Recipe.check(tree), root / f"{name}-{kind}").engine


class Bare:
    """The forward and backward passes of one step, and nothing else."""

    def __init__(self, engine: Engine, batch: int) -> None:
        o = engine.objective
        self.student, self.teacher = o.student.denoiser, o.teacher
        self.fake, self.critic = getattr(o, "fake", None), getattr(o, "critic", None)
        self.players = engine.players
        self.x = torch.randn(batch, *engine.teacher.shape, device=engine.accelerator.device)
        self.t = torch.rand(batch, device=self.x.device)
        self.cond = {"class_labels": torch.randint(10, (batch,), device=self.x.device)}

    def forward(self, network: Any, x: torch.Tensor | None = None) -> torch.Tensor:
        return network(self.x if x is None else x, self.t, self.cond)

    def train(self, loss: Callable[[], torch.Tensor], *names: str) -> None:
        for name in names:
            self.players[name].requires_grad_(True)
        loss().backward()
        for name in names:
            for p in self.players[name].params:
                p.grad = None
            self.players[name].requires_grad_(False)

    def step(self, name: str, step: int) -> None:
        with torch.no_grad():
            networks = {
                "consistency": (self.teacher, self.teacher, self.student),
                "progressive": (self.teacher, self.teacher),
                "sid": (self.student,),
            }.get(name, (self.student,))
            for network in networks:
                self.forward(network)
        if name in ("consistency", "progressive"):
            self.train(lambda: self.forward(self.student).sum(), "student")
        elif name == "sid":
            self.train(lambda: self.forward(self.fake).sum(), "fake")

            def student_loss() -> torch.Tensor:
                x = self.forward(self.student)
                return self.forward(self.teacher, x).sum() + self.forward(self.fake, x).sum()

            self.train(student_loss, "student")
        else:
            if step % 2 == 0:
                with torch.no_grad():
                    self.forward(self.teacher)
                    self.forward(self.fake)
                    if name == "fdistill":
                        self.forward(self.critic)

                def gan_loss() -> torch.Tensor:
                    x = self.forward(self.student)
                    return x.sum() + self.forward(self.critic, x).sum()

                self.train(gan_loss, "student")

            def fake_and_critic_loss() -> torch.Tensor:
                both = {k: torch.cat([v, v]) for k, v in self.cond.items()}
                x, t = torch.cat([self.x, self.x]), torch.cat([self.t, self.t])
                return self.forward(self.fake).sum() + self.critic(x, t, both).sum()  # pyright: ignore

            self.train(fake_and_critic_loss, "fake", "critic")


def peak(run: Callable[[], Any]) -> int:
    """The peak of the bytes that `run` allocates on top of those allocated before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events: list[Any] = profiler.profiler.kineto_results.events()  # pyright: ignore
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = highest = 0
    for _, change in changes:
        total += change
        highest = max(highest, total)
    return highest


def state_bytes(engine: Engine) -> int:
    """Bytes of all weights, their average and all optimizer moments."""
    networks = [v for v in vars(engine.objective).values() if isinstance(v, torch.nn.Module)]
    weights = {id(p): p for n in networks for p in n.parameters()}
    moments = [
        v for q in engine.players.values() for s in q.optimizer.state.values() for v in s.values()
    ]
    return sum(v.nbytes for v in [*weights.values(), *moments, *engine.ema.mean])


def measure(name: str, kind: str, rounds: int, steps: int, batch: int) -> dict[str, Any]:
    """Medians over rounds; each times `steps` engine steps, then `steps` bare ones."""
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(name, kind, Path(folder), batch)
        stream = Stream(engine.source, engine.accelerator.device, 0, range(1), 1, batch)
        bare, ratios, cost = Bare(engine, batch), [], []
        sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        for round_ in range(rounds + 1):
            times = []
            for run in (lambda i: engine.advance(stream), lambda i: bare.step(name, i)):
                sync()
                start = time.perf_counter()
                for i in range(steps):
                    run(i)
                sync()
                times.append(time.perf_counter() - start)
            if round_:  # round 0 warms up
                ratios.append(times[0] / times[1])
                cost.append(times[0] / steps)
        memory = [peak(lambda: engine.advance(stream)), peak(lambda: bare.step(name, 0))]
        state = state_bytes(engine)
        stream.close()
        parameters = sum(p.numel() for p in engine.players["student"].params)
    return {
        "objective": name,
        "network": kind,
        "parameters": parameters,
        "batch": batch,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "memory": (state + memory[0]) / (state + memory[1]),
        "memory_bytes": [state, *memory],
        "step_s": statistics.median(cost),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", choices=("digits", "5m", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.steps += options.steps % 2  # the student has its turn at every second step
    kinds = ("digits", "5m") if options.network == "both" else (options.network,)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    sys.stdout.write(f"{device}, {torch.get_num_threads()} threads\n")
    rows = []
    for kind in kinds:
        for name in FIVE:
            row = measure(name, kind, options.rounds, options.steps, 64 if kind == "digits" else 16)
            rows.append(row)
            sys.stdout.write(
                f"{kind:7} {name:12} {row['parameters'] / 1e6:.2f} M  "
                f"engine/bare {row['ratio']:.3f} "
                f"({row['ratio_low']:.3f} to {row['ratio_high']:.3f})  "
                f"{1e3 * row['step_s']:.0f} ms a step  memory {row['memory']:.3f}\n"
            )
            sys.stdout.flush()
    if options.json:
        options.json.write_text(json.dumps({"device": device, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
