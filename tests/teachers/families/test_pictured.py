"""Pipelines with a picture as a condition: the stock pipelines' own inputs, guidance and pixels."""

from __future__ import annotations

import pytest
import torch

from students import schedulers
from students.export.folder import rehearse
from students.lora import Adapter
from teachers import load
from tests.helpers import families
from tests.helpers.disturbed import disturbed

NAMES = tuple(families.PICTURED)


@pytest.fixture
def opened(folders):
    """The small teacher, with weights far enough from their first values that all inputs count."""

    def teacher(name, by=0.05, **more):
        made = load(folders(name), **families.OPTIONS.get(name, {}), **more)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in made.denoiser.parameters():
                p.add_(by * torch.randn_like(p))
        return made

    return teacher


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adapter", [None, Adapter(rank=4)], ids=["full", "lora"])
def test_a_stock_pipeline_samples_the_student(opened, name, adapter):
    teacher = opened(name)
    student = schedulers.student(teacher, 2, None, adapter is None, adapter)
    rehearse(disturbed(student).eval(), teacher)
