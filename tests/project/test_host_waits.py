"""Objectives and students never make the host wait for the device while they train."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = [*sorted((ROOT / "distill" / "objectives").rglob("*.py")), ROOT / "students/generator.py"]


def waiting_copies(source: str) -> list[int]:
    """Lines that make a tensor of Python numbers on a device: a copy for which the host waits.

    `torch.tensor(…).to(device, non_blocking=True)` queues it.
    """
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        placed = any(k.arg == "device" for k in node.keywords)
        waits = node.func.attr == "new_tensor" or (
            node.func.attr in ("tensor", "as_tensor") and placed
        )
        lines += [node.lineno] * waits
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_tensor_is_made_on_the_device_from_numbers(path):
    assert waiting_copies(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    ["torch.tensor([1.0], device=x.device)", "x.new_tensor([1.0])", "torch.as_tensor(v, device=d)"],
)
def test_such_a_copy_is_found(line):
    assert waiting_copies(line) == [1]
    assert waiting_copies("torch.tensor([1.0]).to(x.device, non_blocking=True)") == []
