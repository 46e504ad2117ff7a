"""Where two recipes differ."""

from __future__ import annotations

from typing import Any

# Keys that may change when a run is resumed: none of them changes the weights so far. Compiled code
# computes the same with other rounding, and a machine that cannot compile must be able to go on.
FREE = {"train.compile", "train.steps", "train.hours", "train.log_every", "train.save_every",
        "train.sample_every", "train.keep", "train.trackers", "train.accumulate", "data.cache",
        "data.cache_limit_gb", "data.in_memory_gb", "data.skip_share"}  # fmt: skip


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Key path and both values wherever two plain trees differ, except for the keys in FREE."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            difference
            for k in {**a, **b}
            for difference in differences(a.get(k), b.get(k), f"{path}.{k}".strip("."))
        ]
    free = path in FREE or path.startswith(("eval", "export", "train.guards"))
    return [] if a == b or free else [(path, a, b)]
