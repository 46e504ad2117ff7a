"""A second device on a machine that has none: finds what a GPU would refuse, on the CPU.

A tensor of `FakeGPU` says that it is on `GPU` and keeps its values in host memory, so all numbers
are right, while the rules are those of a CUDA device:

- an operation takes tensors of one device; a host tensor beside them must be a scalar (0-dim) of an
  elementwise operation, or an index;
- `numpy()` is refused, and a generator must be of the device that it draws on;
- inside `hot()`, nothing may make the host wait for the device: no `item()`, `tolist()`,
  `bool(tensor)` or `float(tensor)`, no shape that depends on values, and no blocking copy.

PyTorch's "lazy" device type stands for the GPU. It is in every build, nothing else here uses it,
and autograd runs on it without a driver. What is not imitated: autocast, streams, and kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

GPU = torch.device("lazy")

# Operations whose result's shape or value the host must know before it can go on.
WAITS = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "allclose", "masked_select",
    "bincount", "unique_dim", "unique_consecutive", "_unique", "_unique2", "repeat_interleave",
    "_linalg_check_errors",
}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
SCALARS = {"fill_", "masked_fill", "masked_fill_", "index_fill", "index_fill_"}  # may be host ones
RANDOM = {"rand", "randn", "randint", "randperm", "normal_", "uniform_", "random_", "bernoulli",
          "bernoulli_", "multinomial", "exponential_", "normal"}  # fmt: skip


# Another generator than the host's: the same seed gives other numbers there.
OTHER = {
    **dict.fromkeys(("randn", "randn_like"), lambda x: x.neg_()),
    **dict.fromkeys(("rand", "rand_like"), lambda x: x.neg_().add_(1 - 2**-24)),
}
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
FILLED = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


class DeviceError(RuntimeError):
    """What a GPU would refuse, or inside `hot()` wait for."""


class OnGPU(Tensor):
    """A tensor that says it is on the GPU; `inner` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        return Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner
        for meter in _meters:
            meter.add(inner)

    # By these two `Module.to` knows that it must swap tensors, and not only their memory.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> OnGPU:
        return OnGPU(inner["inner"])

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().numpy()
        raise DeviceError("numpy() of a tensor on the GPU: use .cpu() first")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        _wait("tolist")
        return self.inner.tolist()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self) -> str:
        return f"OnGPU({self.inner!r})"


_meters: list[MemoryMeter] = []  # those that are entered


class MemoryMeter:
    """Counts the bytes on the GPU while it is entered: `now`, and the `most` at one time.

    Storages count that a tensor of the GPU was made of inside it, until they are freed.
    """

    def __init__(self) -> None:
        self.now = self.most = 0
        self._known: set[int] = set()

    def add(self, inner: Tensor) -> None:
        storage = inner.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __enter__(self) -> MemoryMeter:
        _meters.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _meters.remove(self)


_hot = 0  # how many hot() are entered


@contextmanager
def hot() -> Iterator[None]:
    """Inside, the host may not wait for the device; on a real GPU, CUDA says when it does."""
    global _hot
    real = torch.cuda.is_available()
    _hot += 1
    if real:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        _hot -= 1
        if real:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def cold() -> Iterator[None]:
    """Inside, it may again: for what is logged or saved."""
    global _hot
    before, _hot = _hot, 0
    try:
        yield
    finally:
        _hot = before


class _Made(TorchFunctionMode):
    """`torch.tensor` and its like fill a device without asking a dispatch mode: on the host here,
    then moved, which is also what a GPU does."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in INDEXING and on_gpu(args[0]):
            args = (args[0], _index(args[1]), *args[2:])
        if func is Tensor.new_tensor and on_gpu(args[0]) and kwargs.get("device") is None:
            kwargs["device"] = GPU
        device = kwargs.get("device")
        if func not in FILLED or device is None or torch.device(device).type != GPU.type:
            return func(*args, **kwargs)
        if args and on_gpu(args[0]) and func is not Tensor.new_tensor:
            return args[0].to(kwargs.get("dtype") or args[0].dtype)
        grad = kwargs.pop("requires_grad", False)
        if func is Tensor.new_tensor:
            func, args = torch.tensor, args[1:]
        return func(*args, **kwargs | {"device": "cpu"}).to(GPU).requires_grad_(grad)


def _index(value: Any) -> Any:
    """Lists in an index are tensors on the GPU."""
    if isinstance(value, tuple):
        return tuple(map(_index, value))
    return torch.tensor(value).to(GPU) if isinstance(value, list) else value


class FakeGPU(TorchDispatchMode):
    """While it is entered, tensors can be made on `GPU` and moved to it."""

    def __init__(self) -> None:
        super().__init__()
        self._made = _Made()

    def __enter__(self) -> FakeGPU:
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class Pool(ThreadPoolExecutor):
    """Threads in which the fake GPU is there too: modes belong to the thread that enters them."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        def inside() -> Any:
            with FakeGPU():
                return fn(*args, **kwargs)

        return super().submit(inside)


class _Autocast(torch.autocast):
    """torch refuses to hear of autocast on the device type that stands for the GPU."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        here = "cpu" if device_type == GPU.type else device_type
        super().__init__(here, *args, **kwargs)


@contextmanager
def installed(monkeypatch: Any) -> Iterator[None]:
    """The fake GPU is there, and is what Accelerate picks; optimisers have their kernels on it."""
    import torch.optim.optimizer as optimizer
    from torch.utils import _foreach_utils

    from distill.data import stream
    from students.export import folder

    known = ["cpu", GPU.type]
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", GPU.type)
    monkeypatch.setattr(torch, "autocast", _Autocast)
    monkeypatch.setattr(stream, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(torch, GPU.type, SimpleNamespace(_initialized=False), raising=False)
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda kind="cpu": kind != GPU.type and enabled(kind)
    )
    script = folder.SCRIPT.replace('pipe.to(request["device"])', "pipe")  # no other process has it
    monkeypatch.setattr(folder, "SCRIPT", script)
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*known])
    monkeypatch.setattr(_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: [*known])
    with FakeGPU():
        yield


def on_gpu(value: Any) -> bool:
    return isinstance(value, OnGPU)


def _wait(name: str) -> None:
    if _hot:
        raise DeviceError(f"{name}: the host waits for the device")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, by the rules of a GPU."""
    name = func.overloadpacket.__name__
    flat = _flat(args, kwargs)
    there = any(isinstance(v, OnGPU) for v in flat)
    asked = kwargs.get("device")
    target = GPU.type if there and asked is None else asked and torch.device(asked).type
    if target == "meta":
        pass
    elif name in ("_to_copy", "copy_", "_copy_from", "to"):
        _check_copy(name, args, kwargs, target)
    elif there:
        _check(func, name, args, flat)
    rng = kwargs.get("generator") if name in RANDOM and target == GPU.type else None
    if rng is not None and rng.device.type != GPU.type:
        raise DeviceError(f"{name}: a generator of the {rng.device} draws on the GPU")
    if name == "is_pinned":
        return False
    if name in ("_pin_memory", "pin_memory"):
        return args[0].clone()
    inner_args, inner_kwargs = map(_inner, args), {k: _inner(v) for k, v in kwargs.items()}
    if asked is not None and target == GPU.type:
        inner_kwargs["device"] = torch.device("cpu")
    inner_kwargs.pop("pin_memory", None)
    if name == "_efficientzerotensor":  # has no memory, which only its own kernels know
        func = torch.ops.aten.zeros.default
    found = func(*inner_args, **inner_kwargs)
    if target == GPU.type and name in OTHER:
        found = OTHER[name](found)
    given = {id(v.inner): v for v in flat if isinstance(v, OnGPU)}
    same = {id(v) for v in flat if isinstance(v, Tensor)}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, OnGPU):
            return value
        if id(value) in given:  # an in-place operation gives back what it was given
            return given[id(value)]
        return OnGPU(value) if target == GPU.type and id(value) not in same else value

    return wrapped(found) if isinstance(found, Tensor) else tree_map(wrapped, found)


def _flat(args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """All arguments; an operation has lists of tensors, and no lists of lists."""
    flat = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, list | tuple):
            flat += value
        else:
            flat.append(value)
    return flat


def _inner(value: Any) -> Any:
    """An argument with the host's tensors in the place of the GPU's."""
    if isinstance(value, list | tuple):
        return type(value)([v.inner if isinstance(v, OnGPU) else v for v in value])
    return value.inner if isinstance(value, OnGPU) else value


def _check_copy(name: str, args: Any, kwargs: dict[str, Any], target: str | None) -> None:
    """Copies between the devices are allowed; those that wait, not inside `hot()`."""
    if name == "copy_":
        here, there = on_gpu(args[0]), on_gpu(args[1])
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        small = args[1].dim() == 0 and here  # a scalar goes with the kernel's arguments
    else:
        here, there = target == GPU.type, on_gpu(args[0])
        waits, small = not kwargs.get("non_blocking", False), False
    if here != there and waits and not small:
        _wait("a blocking copy to the GPU" if here else "a copy to the host")


def _check(func: Any, name: str, args: Any, flat: list[Any]) -> None:
    """Refuse tensors of two devices, and inside `hot()` what the host must wait for."""
    if name in WAITS:
        _wait(name)
    hosts = [v for v in flat if isinstance(v, Tensor) and not isinstance(v, OnGPU)]
    if name in INDEXED:
        indices = [v for v in args[1] if v is not None]
        if any(not on_gpu(v) for v in indices):
            _wait(f"{name} by an index of the host")
        if any(v.dtype in (torch.bool, torch.uint8) for v in indices):
            _wait(f"{name} by a mask")
        hosts = [v for v in hosts if not any(v is i for i in indices)]
        if not on_gpu(args[0]):
            raise DeviceError(f"{name}: a host tensor is indexed by one on the GPU")
    scalars = torch.Tag.pointwise in func.tags or name in SCALARS or name in INDEXED
    scalars = scalars or name.startswith("_foreach_")
    if name == "where" and not on_gpu(args[0]):
        raise DeviceError("where: its condition is on the host, its values are on the GPU")
    for v in hosts:
        if v.dim() or not scalars:
            shape = tuple(v.shape)
            raise DeviceError(f"{name}: a host tensor of shape {shape} meets one on the GPU")
