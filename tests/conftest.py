"""Shared fixtures: small real pipelines on disk, and a fresh Accelerate state for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from tests import toys


@pytest.fixture(autouse=True)
def _fresh_state():
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random UNet2D pipelines in the real on-disk format, by kind."""
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: toys.save_pipeline(kind, root / kind) for kind in toys.KINDS}
