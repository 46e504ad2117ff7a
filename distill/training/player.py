"""A player: weights, their optimiser and their learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.config.optimizer import OptimizerConfig
from distill.training import optimizers

BUCKET = 1 << 23  # elements averaged in one all-reduce: 32 MiB of float32


class Player:
    """Weights that learn in turns. They require grad during their turn and at no other time.

    Networks are not wrapped in DistributedDataParallel, which fails under a JVP and loses gradients
    when adapters take turns on one backbone. Gradients are averaged here, once per update.

    Args:
        config: Learning rate, clipping and the optimiser's settings.
        steps: How many engine steps the run has, for the schedule.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        accelerator: Accelerator,
        config: OptimizerConfig,
        steps: int,
    ) -> None:
        self.params = list(params)
        self.accelerator, self.config = accelerator, config
        self.steps = max(1, steps - config.begins)  # that it may learn in, by default its decay's
        self.optimizer = optimizers.optimizer(
            config.optimizer, self.params, config.lr, config.betas, config.eps, config.weight_decay
        )
        self.schedule_start = config.begins  # a step of the engine
        self.waiting = False  # whether the scalar that it waits for was too high when last logged
        self.learned = 0  # the last step in which it learned
        self.grad_norm = torch.zeros(())
        self.requires_grad_(False)

    def requires_grad_(self, flag: bool) -> None:
        for p in self.params:
            p.requires_grad_(flag)

    def rate(self, step: int) -> float:
        """The learning rate of a turn at the engine's `step`."""
        return self.config.rate(max(0, step - self.schedule_start), self.steps)

    def learns(self, step: int, every: int) -> bool:
        """Whether it takes part in its turns of the engine's `step`.

        Args:
            every: Steps between logs. One that waits learns once in as many, so that what it waits
                for is known; a player of every step does so in the logged ones.
        """
        return step >= self.config.begins and (not self.waiting or step - self.learned >= every)

    def hear(self, scalars: Mapping[str, float]) -> None:
        """Wait from now on, or no more, by the logged scalars."""
        wait = self.config.waits
        key = None if wait is None else wait.found(scalars)
        if wait is not None and key is not None:
            self.waiting = scalars[key] > wait.above

    def restart(self, step: int) -> None:
        """Clear the optimiser state and restart the learning-rate schedule."""
        self.optimizer.state.clear()
        self.schedule_start = max(step, self.config.begins)

    @contextmanager
    def turn(self, step: int, reset: bool = False) -> Iterator[None]:
        """Inside, these weights learn; on exit their gradients are averaged, clipped and applied.

        Args:
            step: The engine's, from which the learning rate follows.
            reset: Clear the optimiser state and restart the learning-rate schedule.
        """
        if reset:
            self.restart(step)
        self.learned = step
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.requires_grad_(True)
        try:
            yield
            self._apply()
        finally:
            self.optimizer.zero_grad()
            self.requires_grad_(False)

    def _apply(self) -> None:
        average_gradients(self.params, self.accelerator)
        scaler = self.accelerator.scaler  # there is one in fp16; the engine updates it
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        self.grad_norm = nn.utils.clip_grad_norm_(
            self.params, self.config.clip or math.inf, foreach=True
        )
        if scaler is not None:
            scaler.step(self.optimizer)
        else:
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        optimizer = {str(i): s for i, s in self.optimizer.state_dict()["state"].items()}
        return {
            "params": [p.detach() for p in self.params],
            "optimizer": optimizer,
            "schedule_start": self.schedule_start,
            "waiting": self.waiting,
            "learned": self.learned,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for p, saved in zip(self.params, state["params"], strict=True):
            if p.shape != saved.shape:
                raise ValueError(f"a weight is {tuple(saved.shape)}, not {tuple(p.shape)}")
            p.copy_(saved)
        groups = self.optimizer.state_dict()["param_groups"]
        moments = {int(i): s for i, s in state["optimizer"].items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.schedule_start = state.get("schedule_start", state.get("born", 0))
        self.waiting = state.get("waiting", False)  # earlier versions saved none
        self.learned = state.get("learned", 0)


@torch.no_grad()
def average_gradients(params: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Average gradients over processes, in buckets; a parameter without one counts as zero."""
    if accelerator.num_processes == 1:
        return
    bucket: list[Tensor] = []
    for i, p in enumerate(params):
        if p.grad is None:  # another rank may have one, and all buckets must match
            p.grad = torch.zeros_like(p)
        bucket.append(p.grad)
        if i + 1 == len(params) or sum(g.numel() for g in bucket) >= BUCKET:
            flat = torch.cat([g.flatten() for g in bucket])
            flat = accelerator.reduce(flat, reduction="mean")
            parts = flat.split([g.numel() for g in bucket])  # pyright: ignore
            torch._foreach_copy_(bucket, [v.view_as(g) for g, v in zip(bucket, parts)])
            bucket = []
