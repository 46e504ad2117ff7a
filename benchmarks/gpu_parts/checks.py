"""Ratios and counts that a CPU can check: what adapters and checkpointing add to a pass."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from students.adapter_layers import using
from students.checkpointing import checkpointing
from students.lora import Adapter, inject

CHECKPOINTED = 1.6  # the most that a checkpointed pass may cost, as a multiple of one that is not
TARGETS = r".*attn\d\.(to_q|to_k|to_v|to_out\.0)"


def adapted(depth: int) -> tuple[nn.Module, int]:
    """A narrow UNet of SDXL's structure with an adapter, and how many layers the adapter has.

    Args:
        depth: Transformer blocks at the coarsest resolution: 10 in SDXL.
    """
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, depth),  # pyright: ignore
        cross_attention_dim=64,
        attention_head_dim=(2, 4, 8),  # pyright: ignore
        use_linear_projection=True,
    )
    inject(network, "student", Adapter(rank=2, targets=TARGETS).config(""))
    layers = 0
    for name, p in network.named_parameters():
        learns = "student" in name.split(".")
        layers += learns and "lora_A" in name
        p.requires_grad_(learns)
    return network.train(), layers


def a_pass(network: nn.Module) -> Callable[[], None]:
    """A forward and a backward pass with the adapter."""
    x, t, text = torch.randn(1, 4, 16, 16), torch.tensor([3]), torch.randn(1, 4, 64)

    def run() -> None:
        with using(network, "student"):
            network(x, t, text).sample.square().sum().backward()

    return run


def least(runs: list[Callable[[], Any]], times: int = 4) -> list[float]:
    """The least seconds of each call. They alternate, since a shared machine's speed drifts."""
    best = [float("inf")] * len(runs)
    for round_ in range(times + 1):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if round_:  # round 0 warms up
                best[i] = min(best[i], time.perf_counter() - start)
    return best


def python_calls(run: Callable[[], Any]) -> int:
    """How many Python functions a call enters."""
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    run()  # what is looked up once
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def choice_calls(network: nn.Module) -> int:
    """Python calls of choosing an adapter, and of choosing none."""

    def choose() -> None:
        with using(network, "student"), using(network, None):
            pass

    return python_calls(choose)


def run(results: dict[str, Any], say: Callable[[str], None]) -> list[str]:
    """Add the figures to the results. The error lines of what is broken."""
    few, few_layers = adapted(1)
    many, many_layers = adapted(10)
    calls = [choice_calls(few), choice_calls(many)]
    results["choice_calls"] = {str(few_layers): calls[0], str(many_layers): calls[1]}
    checkpointed, _ = adapted(10)
    checkpointing(checkpointed)
    plain, recomputed = least([a_pass(many), a_pass(checkpointed)])
    ratio = recomputed / plain
    results["checkpointed"] = {"layers": many_layers, "plain_ms": 1e3 * plain, "ratio": ratio}
    say(
        f"choosing an adapter: {calls[0]} calls at {few_layers} layers, {calls[1]} at {many_layers}"
    )
    say(f"{many_layers} adapted layers: a checkpointed pass is {ratio:.2f} × a plain one")
    broken = []
    if calls[0] != calls[1]:
        broken.append(
            f"checks.choice_calls: {calls[0]} calls at {few_layers} layers and {calls[1]} at "
            f"{many_layers}; choosing an adapter must cost the same for any number"
        )
    if ratio > CHECKPOINTED:
        broken.append(
            f"checks.checkpointed: {ratio:.2f} × a plain pass; expected at most {CHECKPOINTED}"
        )
    return broken
