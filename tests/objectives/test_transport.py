"""The benchmark of maps in one dimension: its map is the teacher's ODE, errors are distances."""

import sys
from pathlib import Path

import pytest
import torch

from teachers.process import Karras
from teachers.solver import heun

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
import transport as tool


def test_the_map_is_the_teachers_ode():
    process = Karras(tool.SIGMA_MIN)
    times = process.grid(120)
    sigma = process.scales(times[:1])[1]
    found = tool.error(lambda z: heun(tool.modes(), z * sigma.float(), times), process)
    assert found < 2e-3


def test_an_error_is_the_mean_distance():
    _, x = tool.transport(Karras(tool.SIGMA_MIN))
    assert tool.error(lambda z: x + 0.25, Karras(tool.SIGMA_MIN)) == pytest.approx(0.25)
    # the quantiles are those of two modes
    assert x.mean().abs() < 1e-4 and x.std().item() == pytest.approx(1.02, abs=0.01)


def test_rows_are_objectives_with_their_fields():
    for name, row in tool.ROWS.items():
        student = tool.Generator(tool.Net(Karras(tool.SIGMA_MIN)), (1.0, 0.5), row.renoise)
        kind = tool.OBJECTIVES[row.objective]
        if set(tool.network_types(kind, tool.Auxiliary)) == set():
            few = student if max(row.counts) == 2 else student.at(1)
            assert kind(teacher=tool.modes(), student=few, **row.fields), name


def test_the_network_ends_at_its_input_where_there_is_no_noise_left():
    net, x = tool.Net(Karras(tool.SIGMA_MIN)), torch.randn(5, 1)
    torch.testing.assert_close(net(x, torch.zeros(5)), x, atol=1e-6, rtol=1e-6)
