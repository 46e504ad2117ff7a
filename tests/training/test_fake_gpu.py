"""The fake GPU refuses what a GPU would, and lets through what it would not."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers import fake_gpu
from tests.helpers.fake_gpu import GPU, DeviceError, FakeGPU, OnGPU, hot


@pytest.fixture(autouse=True)
def entered():
    with FakeGPU():
        yield


def x(*shape):
    return torch.ones(*shape or (4,), device=GPU)


def backward():
    weight = x().requires_grad_()
    (weight * 2).sum().backward()
    weight.grad + torch.ones(4)


MIXED = {
    "a grid of the host": lambda: x() + torch.linspace(0, 1, 4),
    "a matrix product": lambda: x(2, 2) @ torch.eye(2),
    "a scalar beside a matrix product": lambda: torch.addmm(torch.zeros(()), x(2, 2), x(2, 2)),
    "a condition of where": lambda: torch.where(torch.ones(4) > 0, x(), x()),
    "a scalar condition of where": lambda: torch.where(torch.tensor(True), x(), x()),
    "a host tensor indexed by the GPU's": lambda: torch.ones(4)[x().long() - 1],
    "gathering by the host's index": lambda: x().gather(0, torch.zeros(4).long()),
    "an embedding's index": lambda: nn.functional.embedding(torch.zeros(1).long(), x(2, 2)),
    "concatenation": lambda: torch.cat([x(), torch.ones(4)]),
    "stacking scalars": lambda: torch.stack([x().sum(), torch.zeros(())]),
    "a sum in place": lambda: x().add_(torch.ones(4)),
    "many sums in place": lambda: torch._foreach_add_([x()], [torch.ones(4)]),
    "a generator of the host": lambda: torch.randn(2, device=GPU, generator=torch.Generator()),
    "one of the host in place": lambda: x().normal_(generator=torch.Generator()),
    "a layer left behind": lambda: nn.Linear(4, 4)(x(1, 4)),
    "a gradient": backward,
    "numpy()": lambda: x().numpy(),
    "numpy's own way": lambda: __import__("numpy").asarray(x()),
    "comparison by a test": lambda: torch.testing.assert_close(x(), torch.ones(4)),
    "equality": lambda: torch.equal(x(), torch.ones(4)),
}


@pytest.mark.parametrize("case", MIXED)
def test_tensors_of_two_devices_are_refused(case):
    with pytest.raises((DeviceError, AssertionError)) as refused:
        MIXED[case]()
    assert isinstance(refused.value, DeviceError) or "device" in str(refused.value)


WAITS = {
    "item()": lambda: x().sum().item(),
    "float()": lambda: float(x().sum()),
    "int() as a size": lambda: torch.zeros(int(x().sum()), device=GPU),
    "if": lambda: 1 if x().sum() > 0 else 0,
    "tolist()": lambda: x().tolist(),
    "cpu()": lambda: x().cpu(),
    "a value made of the host's": lambda: torch.tensor([1.0, 2.0], device=GPU),
    "new_tensor": lambda: x().new_tensor([1.0]),
    "a grid that is moved": lambda: torch.linspace(0, 1, 4).to(GPU),
    "a copy into host memory": lambda: torch.ones(4).copy_(x()),
    "nonzero": lambda: x().nonzero(),
    "a mask": lambda: x()[x() > 0],
    "a list for an index": lambda: x()[[0, 1]],
    "an index of the host": lambda: x()[torch.tensor([0])],
    "allclose": lambda: torch.allclose(x(), x()),
    "unique": lambda: x().unique(),
    "repeats from the GPU": lambda: x().repeat_interleave(x().long()),
    "solving with a check": lambda: torch.linalg.solve(x(2, 2) + torch.eye(2).to(GPU), x(2, 2)),
}


@pytest.mark.parametrize("case", WAITS)
def test_waiting_for_the_device_is_refused_where_it_must_not_be(case):
    WAITS[case]()
    with hot(), pytest.raises(DeviceError, match="the host waits"):
        WAITS[case]()
    WAITS[case]()


FREE = {
    "a number": lambda: x() * 2.5,
    "a scalar of the host": lambda: x() + torch.tensor(1.0),
    "a value of where": lambda: torch.where(x() > 0, torch.tensor(0.0), x()),
    "a fill": lambda: x().new_full((3,), 2.0).masked_fill(x(3) > 0, 1.0),
    "a queued copy": lambda: torch.ones(4).pin_memory().to(GPU, non_blocking=True),
    "an index of the GPU's": lambda: x()[torch.zeros(2, dtype=torch.long, device=GPU)],
    "slices": lambda: x(4, 4)[1:, None, 0],
    "a product along a direction": lambda: torch.func.jvp(torch.sin, (x(),), (x(),))[1],
    "one through a power": lambda: torch.func.jvp(lambda v: (1 + v) ** 2.5, (x(),), (x(),))[1],
    "its own numbers": lambda: torch.randn(3, device=GPU) + torch.rand_like(x(3)),
    "host work beside it": lambda: x() * torch.linspace(0, 1, 4).sum().item(),
}


@pytest.mark.parametrize("case", FREE)
def test_what_a_gpu_allows_is_allowed(case):
    with hot():
        assert isinstance(FREE[case](), OnGPU)


def test_values_are_those_of_the_host_and_a_seeds_numbers_are_not():
    network, z = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1)), torch.randn(5, 4)
    network(z).square().mean().backward()
    grads = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    weight = network[0].weight
    network.to(GPU)
    assert network[0].weight is weight and isinstance(weight, nn.Parameter)
    twin = copy.deepcopy(network)
    for there in (network, twin):
        there(z.to(GPU)).square().mean().backward()
        for p, grad in zip(there.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad.cpu(), grad)
    assert twin[0].weight.data_ptr() != weight.data_ptr()
    torch.manual_seed(0)
    here = torch.randn(8)
    torch.manual_seed(0)
    assert not torch.equal(torch.randn(8, device=GPU).cpu(), here)


def test_what_is_logged_may_be_waited_for():
    with hot(), fake_gpu.cold():
        assert x().sum().item() == 4
