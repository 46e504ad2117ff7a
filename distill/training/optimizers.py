"""AdamW, and two forms of it that take less of the device's memory.

| name | bytes a parameter on the device | what it is |
|---|---|---|
| adamw | 8 | torch's, fused |
| adamw8bit | 2.03 | bitsandbytes', moments in blocks of 8-bit codes (arXiv:2110.02861) |
| adamw-offloaded | 0 | `OffloadedAdamW`: adamw's numbers, moments in host memory |
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw

from distill.config.optimizer import Name
from teachers.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK, SMALL = 256, 4096  # bitsandbytes': codes per scale; smaller weights have float32 moments


class OffloadedAdamW(Optimizer):
    """AdamW with moments in host memory; each weight's are copied to its device for its update.

    The update is torch's fused kernel on the weight's device, so the numbers are those of
    AdamW(fused=True). Host memory is pinned, and copies in both directions are queued on the
    device's stream: the host never waits. A step moves 16 bytes a parameter over the bus.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore  # closures are not called
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state.update({k: pinned(torch.zeros_like(p)) for k in MOMENTS})
                moments = [state[k].to(p.device, non_blocking=True) for k in MOMENTS]
                adamw(
                    [p],
                    [p.grad],
                    [moments[0]],
                    [moments[1]],
                    [],
                    [state["step"]],
                    fused=True,
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                for key, moment in zip(MOMENTS, moments, strict=True):
                    state[key].copy_(moment, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        if torch.accelerator.is_available():  # copies to the host may be unfinished
            torch.accelerator.synchronize()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimiser's, but moments go straight to host memory."""
        super().load_state_dict({**state_dict, "state": {}})
        params = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            p = params[index]
            moments = {k: pinned(saved[k].to("cpu"), p.device) for k in MOMENTS}
            self.state[p] = {"step": saved["step"].to(p.device), **moments}


def pinned(value: Tensor, visits: torch.device | None = None) -> Tensor:
    """A copy of the tensor in host memory, pinned unless it is only used on the CPU.

    Args:
        visits: The device that it is copied to later; by default the tensor's.
    """
    pinned = (visits or value.device).type != "cpu"
    return torch.empty_like(value, device="cpu", pin_memory=pinned).copy_(value)


def check(name: Name, player: str) -> None:
    """Refuse an optimiser whose package is not installed.

    Raises:
        UserError: naming the command that installs it.
    """
    if name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise UserError(
            f"players.{player}.optimizer: {name} is bitsandbytes', which is not installed; "
            "pip install 'fewstep[memory]'"
        )


def optimizer(
    name: Name,
    params: list[nn.Parameter],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Optimizer:
    """An optimiser by its name in a recipe."""
    if name == "adamw":
        return AdamW(params, lr, betas, eps, weight_decay, fused=True)
    if name == "adamw-offloaded":
        return OffloadedAdamW(params, lr, betas, eps, weight_decay)
    from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    return AdamW8bit(params, lr, betas, eps, weight_decay, min_8bit_size=SMALL)


def optimizer_bytes(name: Name, params: Iterable[Tensor]) -> tuple[int, int]:
    """Bytes of the moments of weights: on their device, and in host memory."""
    sizes = [p.numel() for p in params]
    if name == "adamw":
        return 8 * sum(sizes), 0
    if name == "adamw-offloaded":
        return 8 * max(sizes, default=0), 8 * sum(sizes)  # on the device, one weight's at a time
    return sum(8 * n if n < SMALL else 2 * n + 8 * -(-n // BLOCK) for n in sizes), 0
