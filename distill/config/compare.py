"""Where two recipes differ."""

from __future__ import annotations

from typing import Any

# What may change between a run and its resumption: none of it alters the weights so far.
FREE = {"train.steps", "train.log_every", "train.save_every", "train.sample_every", "train.keep",
        "train.trackers", "train.accumulate", "data.cache", "data.cache_limit_gb",
        "data.in_memory_gb", "data.skip_share"}  # fmt: skip


def differences(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """The key paths at which two plain trees differ, but for those free to."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for k in {**a, **b}:
            found += differences(a.get(k), b.get(k), f"{path}.{k}".strip("."))
        return found
    free = path in FREE or path.startswith(("eval", "export"))
    return [] if a == b or free else [(path, a, b)]
