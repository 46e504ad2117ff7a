"""Read pickles as plain data: nothing is imported, no object is constructed, nothing is executed.

Published EDM and EDM2 networks (arXiv:2206.00364, arXiv:2312.02696) are pickles that carry source
code to execute. Here an interpreter of the opcodes makes only containers, strings and
numbers, and replaces the names in `CALLS` and `CLASSES` by its own functions. Every other name, and
every opcode that could make something else, is refused.
"""

from __future__ import annotations

import math
import mmap
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from teachers.errors import UserError

# torch's storage classes as a tensor's blob names them.
STORAGES = {
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.ShortStorage": torch.int16,
}
MAGIC = 0x1950A86A20F9469CFC6C  # start of a blob in torch's format before zip files
DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")  # numpy's
NUMBERS = tuple(type(np.dtype(name)) for name in DTYPES)  # their classes

# Opcodes whose argument is the value itself.
LITERALS = {
    *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MAKES: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}


class Damaged(ValueError):
    """The bytes are not a valid pickle."""


class Name(NamedTuple):
    """A global named in the pickle; it is never looked up."""

    name: str


@dataclass(eq=False)
class Record:
    """A pickled object as data: its class's bare name ("SongUNet") and its state."""

    kind: str
    state: dict[str, Any] | None = None


@dataclass(eq=False)
class Array:
    """A numpy array; its content arrives as its state."""

    state: np.ndarray | None = None


class Blob(NamedTuple):
    """The header of a storage's blob."""

    dtype: torch.dtype
    key: str
    count: int


def read(path: Path) -> Any:
    """The content of a pickle: containers, strings, numbers, tensors and `Record`s.

    Raises:
        UserError: the file is missing, damaged, or contains more than data; the line names the
            file and what was refused.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            if view[:2] == b"PK":
                raise UserError(f"{path}: a zip file, not an EDM pickle; give the .pkl")
            return Machine(view, str(path), len(view)).run()
    except (Damaged, ValueError, OverflowError) as error:  # pickletools raises ValueError
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else "empty"
        raise UserError(f"{path}: not a whole pickle ({reason}); get the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give an EDM file") from None


class Machine:
    """An interpreter of one pickle stream that produces only data.

    Args:
        budget: Limit of tensor bytes in the stream: the file's size.
    """

    def __init__(self, file: IO[bytes] | mmap.mmap, where: str, budget: int) -> None:
        self.file, self.where, self.budget = file, where, budget
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value of the stream; the file position is then just after it."""
        for opcode, argument, _ in pickletools.genops(self.file):  # pyright: ignore
            if opcode.name == "STOP":
                return self.pop()
            self.step(opcode.name, argument)
        raise Damaged("it has no end")

    def step(self, op: str, argument: Any) -> None:
        if op in LITERALS:
            self.stack.append(argument)
        elif op in MAKES:
            self.stack.append(MAKES[op]())
        elif op in TUPLES:
            self.stack.append(tuple(self.top(TUPLES[op])))
        elif op == "MARK":
            self.marks.append(len(self.stack))
        elif op in ("TUPLE", "LIST", "FROZENSET"):
            items = self.marked()
            made = {"TUPLE": tuple, "LIST": list, "FROZENSET": strings}[op](items)
            self.stack.append(made)
        elif op in ("APPEND", "APPENDS"):
            items = self.marked() if op == "APPENDS" else self.top(1)
            self.target(list).extend(items)
        elif op in ("SETITEM", "SETITEMS"):
            items = self.marked() if op == "SETITEMS" else self.top(2)
            fill(self.target(dict), items)
        elif op == "DICT":
            self.stack.append(fill({}, self.marked()))
        elif op == "ADDITEMS":
            items = strings(self.marked())
            self.target(set).update(items)
        elif op in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            key = len(self.memo) if op == "MEMOIZE" else argument
            self.memo[key] = self.peek()
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise Damaged(f"memo {argument} was never written")
            self.stack.append(self.memo[argument])
        elif op == "POP":
            if self.marks and self.marks[-1] == len(self.stack):
                self.marks.pop()
            else:
                self.pop()
        elif op == "POP_MARK":
            self.marked()
        elif op == "GLOBAL":
            self.stack.append(self.named(*argument.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            self.stack.append(self.named(*self.top(2)))
        elif op in ("REDUCE", "NEWOBJ"):
            self.stack.append(self.make(op, *self.top(2)))
        elif op == "BUILD":
            (state,) = self.top(1)
            build(self.target(Record, Array, *NUMBERS), state)
        elif op not in ("PROTO", "FRAME"):
            raise UserError(
                f"{self.where}: refused: the pickle uses the opcode {op}, which data do not need; "
                "nothing of it was executed"
            )

    def peek(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Damaged("its stack runs empty")
        return self.stack[-1]

    def pop(self) -> Any:
        self.peek()
        return self.stack.pop()

    def top(self, n: int) -> list[Any]:
        """Pop the last n values."""
        return [self.pop() for _ in range(n)][::-1]

    def marked(self) -> list[Any]:
        """Pop everything back to the last mark, and the mark."""
        if not self.marks:
            raise Damaged("it has no mark")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def target(self, *kinds: type) -> Any:
        """The top value, which an opcode will fill; it must be of one of these kinds."""
        value = self.peek()
        if type(value) not in kinds:
            found = f"a {value.name}" if isinstance(value, Name) else f"a {type(value).__name__}"
            raise UserError(
                f"{self.where}: refused: the pickle sets the state of {found}; "
                "nothing of it was executed"
            )
        return value

    def named(self, module: Any, name: Any = "") -> Name:
        """A global as a name, if it is on the list."""
        whole = f"{module}.{name}" if type(module) is str and type(name) is str else "no name"
        if whole not in self.known():
            raise UserError(
                f"{self.where}: refused: the pickle asks for {whole[:120]!r}, which is not on the "
                "list of an EDM network's tensors and plain data; nothing of it was executed"
            )
        return Name(whole)

    def known(self) -> set[str]:
        """The globals that are allowed."""
        return CALLS.keys() | CLASSES.keys() | {"numpy.ndarray"}

    def make(self, op: str, what: Any, arguments: Any) -> Any:
        """The result of a call to a name that `named` allowed."""
        if not isinstance(what, Name) or type(arguments) is not tuple:
            raise Damaged(f"{op} of something that is no name")
        makes = (CALLS if op == "REDUCE" else CLASSES).get(what.name)
        if makes is None:
            raise UserError(
                f"{self.where}: refused: the pickle makes {what.name!r} by {op}; "
                "nothing of it was executed"
            )
        try:
            bound = signature(makes).bind(self, *arguments)
        except TypeError:
            raise Damaged(f"{what.name} with {len(arguments)} arguments") from None
        return makes(*bound.args)

    def storage(self, blob: Any) -> Tensor:
        """A one-dimensional tensor from the bytes of a torch storage."""
        if type(blob) is not bytes:
            raise Damaged("a storage that is not bytes")
        if blob[:2] == b"PK":
            raise Damaged("a storage in a zip file")
        file = BytesIO(blob)
        head = [Header(file, self.where, 0).run() for _ in range(3)]
        if head[0] != MAGIC or head[1] != 1001 or type(head[2]) is not dict:
            raise Damaged("a storage of an unknown format")
        if head[2].get("little_endian") is not True:
            raise Damaged("a storage that is not little-endian")
        kind = Header(file, self.where, 0).run()
        keys = Header(file, self.where, 0).run()
        if not isinstance(kind, Blob) or keys != [kind.key]:
            raise Damaged("a storage that does not name itself")
        dtype, _, count = kind
        n = int.from_bytes(file.read(8), "little", signed=True)
        size = n * dtype.itemsize
        self.budget -= size
        if n != count or n < 0 or len(blob) - file.tell() != size or self.budget < 0:
            raise Damaged("a storage that is not as long as it says")
        if not n:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(bytearray(blob[file.tell() :]), dtype=dtype)


class Header(Machine):
    """The interpreter of a storage's blob: one persistent id, no calls."""

    def step(self, op: str, argument: Any) -> None:
        if op != "BINPERSID":
            return super().step(op, argument)
        (key,) = self.top(1)
        if type(key) is not tuple or len(key) != 6 or key[0] != "storage" or key[5] is not None:
            raise Damaged("a persistent id that is no storage's")
        _, kind, name, _, count, _ = key
        if type(kind) is not Name or type(name) is not str or type(count) is not int:
            raise Damaged("a persistent id that is no storage's")
        self.stack.append(Blob(STORAGES[kind.name], name, count))

    def known(self) -> set[str]:
        return set(STORAGES)


def fill(into: dict[str, Any], items: list[Any]) -> dict[str, Any]:
    """Add alternating keys and values; keys are strings, so hashing cannot be attacked."""
    if len(items) % 2 or any(type(key) is not str for key in items[::2]):
        raise Damaged("a dict whose keys are not strings")
    into.update(zip(items[::2], items[1::2]))
    return into


def strings(items: Any) -> set[str]:
    if type(items) is not list or any(type(item) is not str for item in items):
        raise Damaged("a set of other things than strings")
    return set(items)


def build(target: Any, state: Any) -> None:
    """Set an object's pickled state, once."""
    if isinstance(target, np.dtype):
        if type(state) is not tuple or state[1:2] not in (("<",), ("|",)):
            raise Damaged("a numpy type that is not little-endian")
    elif target.state is not None:
        raise Damaged("an object with two states")
    elif isinstance(target, Array):
        target.state = array(state)
    elif type(state) is dict:
        target.state = state
    else:
        raise Damaged("a state that is no dict")


def array(state: Any) -> np.ndarray:
    """A numpy array from its pickled state."""
    if type(state) is not tuple or len(state) != 5:
        raise Damaged("an array of an unknown version")
    _, shape, dtype, fortran, raw = state
    return values(dtype, raw, whole(shape)).reshape(shape, order="F" if fortran else "C")


def values(dtype: Any, raw: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A flat array of numbers from its bytes."""
    if not isinstance(dtype, np.dtype):
        raise Damaged("an array without a type")
    if type(raw) is not bytes or len(raw) != dtype.itemsize * math.prod(shape):
        raise Damaged("an array that is not as long as it says")
    return np.frombuffer(raw, dtype)


def whole(shape: Any) -> tuple[int, ...]:
    """A tuple of at most eight sizes or strides."""
    if type(shape) is not tuple or len(shape) > 8:
        raise Damaged("a shape that is none")
    if any(type(n) is not int or not 0 <= n < 2**48 for n in shape):
        raise Damaged("a shape that is none")
    return shape


# Functions for the allowed names: arguments are the machine, then the pickled arguments.


def persistent(machine: Machine, meta: Any) -> Record:
    """An object pickled with its source code, which is ignored."""
    if type(meta) is not dict or meta.get("type") != "class":
        raise Damaged("a persistent object that is no class")
    name, state = meta.get("class_name"), meta.get("state")
    if type(name) is not str or type(state) not in (dict, type(None)):
        raise Damaged("a persistent object without a name")
    return Record(name, state or {})


def rebuild_tensor(
    machine: Machine,
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> Tensor:
    """A view of a storage; every element must lie inside it."""
    size, stride = whole(size), whole(stride)
    if not isinstance(storage, Tensor) or type(offset) is not int or len(size) != len(stride):
        raise Damaged("a tensor without a storage")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    empty = not math.prod(size)
    if offset < 0 or math.prod(size) > len(storage) or (not empty and last >= len(storage)):
        raise Damaged("a tensor that is larger than its storage")
    return storage.new_empty(size) if empty else storage.as_strided(size, stride, offset)


def rebuild_parameter(machine: Machine, data: Any, requires_grad: Any, hooks: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Damaged("a parameter that is no tensor")
    return data


def dtype(machine: Machine, name: Any, align: Any = False, copy: Any = True) -> np.dtype:
    """A numeric numpy dtype; structured and object dtypes are refused."""
    if type(name) is not str or name not in DTYPES:
        raise UserError(
            f"{machine.where}: refused: numpy's type {str(name)[:40]!r} is not a number's; "
            "nothing of it was executed"
        )
    return np.dtype(f"<{name}")


def scalar(machine: Machine, dtype: Any, raw: Any) -> Any:
    return values(dtype, raw, ())[0].item()


def ndarray(machine: Machine, kind: Any, shape: Any, code: Any) -> Array:
    if kind != Name("numpy.ndarray"):
        raise Damaged("an array of another class")
    return Array()


CALLS: dict[str, Callable[..., Any]] = {
    "builtins.set": lambda machine, items: strings(items),
    "collections.OrderedDict": lambda machine: {},
    "numpy._core.multiarray._reconstruct": ndarray,
    "numpy._core.multiarray.scalar": scalar,
    "numpy.core.multiarray._reconstruct": ndarray,
    "numpy.core.multiarray.scalar": scalar,
    "numpy.dtype": dtype,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch.storage._load_from_bytes": Machine.storage,
    "torch_utils.persistence._reconstruct_persistent_obj": persistent,
}
CLASSES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda machine: {},
    "dnnlib.util.EasyDict": lambda machine: {},
    "torch.nn.modules.container.ModuleDict": lambda machine: Record("module"),
    "torch.nn.modules.container.ModuleList": lambda machine: Record("module"),
}
