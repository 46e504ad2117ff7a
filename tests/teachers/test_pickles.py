"""Pickles read as data: what a network needs comes through, and nothing else ever happens.

Each hostile file would leave a canary behind if any of it were executed.
"""

import builtins
import collections
import io
import os
import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from torch import nn

from teachers import UserError
from teachers.edm import checkpoints, pickles
from tests.helpers import edm_pickles
from tests.helpers.edm_pickles import EasyDict, Persistent, dump, foreign, weight
from tests.helpers.refusals import check_message

KNOWN, _ = edm_pickles.golden()


@pytest.fixture
def canary(tmp_path):
    """A path that nothing may have written by the end of the test."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def refused(path, *words):
    """The one line that a hostile file is refused with, which names the file."""
    with pytest.raises(UserError) as error:
        pickles.read(path)
    line = str(error.value)
    check_message(line, str(path), *words)
    assert len(line) < 600
    return line


class Call:
    """Pickles as a call of any function, with a state if there is one."""

    def __init__(self, function, *arguments, state=None):
        self.parts = function, arguments, state

    def __reduce__(self):
        return self.parts


def text(value):
    """A string as opcodes."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def touch(canary):
    return f"open({str(canary)!r}, 'w').close()"


# What comes through.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_is_what_it_was(tmp_path, protocol):
    data = {"a": [1, -(2**70), 2.5, None, True], "b": ("x", "é", {"c": []}), "d": {"s", "t"}}
    if protocol > 2:  # protocol 2 writes sets and bytes as calls into Python 2's modules
        data["e"] = b"\x00\xff"
    else:
        del data["d"]
    shared = [1]
    data["shared"] = [shared, shared]
    found = pickles.read(dump(data, tmp_path / "plain.pkl", protocol))
    assert found == data
    assert found["shared"][0] is found["shared"][1]


def test_dicts_of_their_own_kinds_are_dicts(tmp_path):
    data = {"o": collections.OrderedDict(a=1), "e": EasyDict(b=EasyDict(c=2))}
    assert pickles.read(dump(data, tmp_path / "dicts.pkl")) == {"o": {"a": 1}, "e": {"b": {"c": 2}}}


@pytest.mark.parametrize("dtype", sorted(pickles.STORAGES.values(), key=str))
def test_tensors_are_what_they_were(tmp_path, dtype):
    tensor = (torch.arange(24) % 2).view(2, 3, 4).to(dtype)
    data = [tensor, tensor[1].t(), tensor[:, ::2], tensor[0, 0, 0], tensor[:0]]
    found = pickles.read(dump(data, tmp_path / "tensors.pkl"))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, data, strict=True))


def test_numpys_numbers_and_arrays_are_what_they_were(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    data = [np.float64(0.5), np.int32(3), np.bool_(True), array, np.asfortranarray(array)]
    found = pickles.read(dump(data, tmp_path / "numpy.pkl"))
    assert found[:3] == [0.5, 3, True]
    assert all(np.array_equal(a.state, array) for a in found[3:])


def test_a_networks_tensors_are_found_by_their_names(tmp_path):
    path = edm_pickles.save(KNOWN["ncsnpp"], tmp_path / "net.pkl")
    network = pickles.read(path)["ema"]
    assert network.kind == "EDMPrecond"
    assert network.state["_init_kwargs"] == KNOWN["ncsnpp"]["arguments"]
    found = checkpoints.tensors(network, str(path))
    assert found.keys() == KNOWN["ncsnpp"]["names"].keys()
    assert all(torch.equal(v, weight(k, tuple(v.shape))) for k, v in found.items())


def test_the_source_in_a_pickle_is_never_executed(tmp_path, canary):
    source = f"{touch(canary)}\nclass EDMPrecond:\n    def __setstate__(self, s): {touch(canary)}\n"
    path = edm_pickles.save(KNOWN["ddpmpp"], tmp_path / "net.pkl", source)
    checkpoints.convert(path, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not {"torch_utils", "dnnlib"} & set(sys.modules)


# What is refused.


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("function", [os.system, builtins.eval, builtins.exec, os.unlink])
def test_a_call_of_anything_else_is_refused_by_name(tmp_path, canary, function, protocol):
    path = tmp_path / "bad.pkl"
    words = f"touch {canary}" if function is os.system else touch(canary)
    path.write_bytes(pickle.dumps({"ema": Call(function, words)}, protocol))
    refused(path, "refused", function.__name__)


@pytest.mark.parametrize(
    "name",
    [
        "posix system",
        "builtins getattr",
        "builtins __import__",
        "copyreg _reconstructor",
        "copyreg __newobj__",
        "copyreg add_extension",
        "functools partial",
        "operator attrgetter",
        "importlib import_module",
        "torch load",
        "torch.hub load",
        "torch.nn.modules.container ModuleDict.__init__",
        "torch_utils.persistence _src_to_module",
        "torch_utils.persistence import_hook",
        "numpy.core.multiarray fromfile",
        "numpy load",
        "pickle loads",
        "collections namedtuple",
        "_codecs encode",
        "teachers.pickles read",
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_a_name_is_refused_before_anyone_looks_it_up(tmp_path, canary, name, stacked):
    module, _, attribute = name.partition(" ")
    call = f"c{module}\n{attribute}\n".encode()
    if stacked:
        call = text(module) + text(attribute) + b"\x93"
    path = tmp_path / "bad.pkl"
    path.write_bytes(b"\x80\x04" + call + b"(" + text(touch(canary)) + b"tR.")
    refused(path, f"{module}.{attribute}", "nothing of it was executed")


def test_a_name_put_together_on_the_stack_is_the_whole_name(tmp_path, canary):
    for module, attribute in [
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch", "_utils._rebuild_tensor_v2.__init__"),
        ("torch.storage", "io.open"),
        ("", ""),
    ]:
        path = tmp_path / "bad.pkl"
        path.write_bytes(b"\x80\x04" + text(module) + text(attribute) + b"\x93.")
        refused(path, "not on the list")
    for pushed in (b"N" + text("x"), text("os") + b"(" + text("system") + b"t", b"]]"):
        path.write_bytes(b"\x80\x04" + pushed + b"\x93.")
        refused(path)


def test_a_name_taken_from_the_memo_is_still_only_a_name(tmp_path, canary):
    good = b"ctorch._utils\n_rebuild_tensor_v2\n"
    for body in (
        good + b"q\x00" + text("os") + b"q\x00" + b"0h\x00(tR",  # the memo is overwritten
        b"h\x05(tR",  # and never written
        good + b"\x94" + text("x") + b"h\x00\x93",  # a name as a module's name
    ):
        path = tmp_path / "bad.pkl"
        path.write_bytes(b"\x80\x04" + body + b".")
        refused(path)


class Hostile(nn.ModuleDict):
    pass


@pytest.mark.parametrize("state", ["reduce", "dict", "tuple"])
def test_a_hostile_state_is_refused_inside_an_allowed_class(tmp_path, canary, state):
    call = Call(os.system, f"touch {canary}")
    module = nn.ModuleDict()
    if state == "dict":
        module.__dict__["__setstate__"] = call
        path = dump(module, tmp_path / "bad.pkl")
    elif state == "tuple":  # slots' states come as a pair, which sets attributes
        head = b"\x80\x04ctorch.nn.modules.container\nModuleDict\n)\x81"
        path = tmp_path / "bad.pkl"
        path.write_bytes(head + b"N}" + text("__class__") + b"cos\nsystem\ns\x86b.")
    else:
        path = dump(Call(nn.ModuleDict, state=call), tmp_path / "bad.pkl")
    refused(path, "refused")


def test_the_state_of_a_name_a_dict_or_a_tensor_cannot_be_set(tmp_path, canary):
    head = b"\x80\x04"
    state = b"}" + text("__reduce__") + text("x") + b"s"
    tensor = pickle.dumps(torch.zeros(2), 4)[:-1]
    for target in (b"ctorch.nn.modules.container\nModuleDict\n", b"}", b"]", b"N", tensor[2:]):
        path = tmp_path / "bad.pkl"
        path.write_bytes(head + target + state + b"b.")
        refused(path, "sets the state of a")


def test_a_state_is_only_kept_and_never_called(tmp_path, canary):
    source = f"def __setstate__(self, s): {touch(canary)}"
    states = {"__setstate__": source, "__class__": "os.system", "__dict__": {"x": 1}}
    found = pickles.read(dump(Persistent("EDMPrecond", states), tmp_path / "odd.pkl"))
    assert type(found) is pickles.Record and found.state == states


def test_modules_and_calls_are_not_mixed_up(tmp_path, canary):
    newobj = b"\x80\x04ctorch.storage\n_load_from_bytes\nC\x01x\x85\x81."
    reduce = b"\x80\x04ctorch.nn.modules.container\nModuleDict\n)R."
    for raw in (newobj, reduce):
        path = tmp_path / "bad.pkl"
        path.write_bytes(raw)
        refused(path, "the pickle makes")


@pytest.mark.parametrize(
    ("opcodes", "named"),
    [
        (b"(ios\nsystem\n", "INST"),
        (b"(cos\nsystem\no", "os.system"),
        (b"(ctorch.nn.modules.container\nModuleDict\no", "OBJ"),
        (b"\x82\x01", "EXT1"),
        (b"\x83\x01\x00", "EXT2"),
        (b"\x84\x01\x00\x00\x00", "EXT4"),
        (b"Pid\n", "PERSID"),
        (b"NQ", "BINPERSID"),
        (b"ctorch.nn.modules.container\nModuleDict\n)}\x92", "NEWOBJ_EX"),
        (b"\x97", "NEXT_BUFFER"),
        (b"S'x'\n", "STRING"),
    ],
)
def test_an_opcode_that_data_do_not_need_is_refused(tmp_path, canary, opcodes, named):
    path = tmp_path / "bad.pkl"
    path.write_bytes(b"\x80\x04" + opcodes + b".")
    refused(path, named)


# Nested blobs.


def blob(*parts, raw=b""):
    return b"".join(part if type(part) is bytes else pickle.dumps(part, 2) for part in parts) + raw


def tensor_of(path, content):
    with path.open("wb") as file:
        pickle.dump(Call(torch.storage._load_from_bytes, content), file)
    return path


@pytest.mark.parametrize("where", range(5))
def test_a_storages_blob_can_call_nothing(tmp_path, canary, where):
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [pickles.MAGIC, 1001, info, None, ["0"]]
    parts[where] = Call(os.system, f"touch {canary}")
    refused(tensor_of(tmp_path / "bad.pkl", blob(*parts)), "posix.system")


def test_a_tensor_saved_whole_cannot_hide_in_a_storages_blob(tmp_path, canary):
    for zipped in (False, True):
        file = io.BytesIO()
        content = {"x": Call(os.system, f"touch {canary}")}
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        refused(tensor_of(tmp_path / "bad.pkl", file.getvalue()))


def good_blob(values):
    file = io.BytesIO()
    torch.save(values, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def test_a_storage_is_as_long_as_it_says(tmp_path):
    storage = torch.arange(4.0)._typed_storage()
    whole = good_blob(storage)
    path = tensor_of(tmp_path / "good.pkl", whole)
    assert torch.equal(pickles.read(path), torch.arange(4.0))
    head, data = whole[:-24], whole[-16:]
    for length in (0, 3, 5, -1, 2**62, -(2**63)):
        bad = head + struct.pack("<q", length) + data
        refused(tensor_of(tmp_path / "bad.pkl", bad), "not as long as it says")
    refused(tensor_of(tmp_path / "bad.pkl", whole[:-1]), "not as long as it says")


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (2**40,), (0,)),
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (-1, (2,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (2**40, 2**40), (1, 1)),
        (0, (1,) * 99, (1,) * 99),
        (0, ("2",), (1,)),
        (0, [4], [1]),
        (2**80, (1,), (1,)),
    ],
)
def test_a_tensor_lies_inside_its_storage(tmp_path, offset, size, stride):
    storage = Call(torch.storage._load_from_bytes, good_blob(torch.arange(4.0)._typed_storage()))
    made = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    refused(dump(made, tmp_path / "bad.pkl"), "not a whole pickle")


def test_one_blob_cannot_be_made_into_many_storages(tmp_path):
    content = good_blob(torch.zeros(10_000)._typed_storage())
    once = b"h\x00\x85R"
    head = b"\x80\x04B" + struct.pack("<I", len(content)) + content + b"q\x000"
    call = b"ctorch.storage\n_load_from_bytes\n"
    path = tmp_path / "bad.pkl"
    path.write_bytes(head + call + once + b".")
    assert len(pickles.read(path)) == 10_000
    path.write_bytes(head + b"(" + (call + once) * 9 + b"l.")
    refused(path, "not as long as it says")


def test_lengths_that_are_not_there_allocate_nothing(tmp_path):
    for raw in (
        b"\x8e" + struct.pack("<Q", 2**62),  # BINBYTES8
        b"\x8e" + struct.pack("<Q", 2**63 + 5),
        b"\x8d" + struct.pack("<Q", 2**40),  # BINUNICODE8
        b"B" + struct.pack("<I", 2**32 - 1),
        b"\x8b" + struct.pack("<i", 2**31 - 1),  # LONG4
        b"\x8b" + struct.pack("<i", -5),
        b"L" + b"9" * 10_000 + b"L\n",  # digits that take the square of their number to read
        b"r" + struct.pack("<I", 2**32 - 1),  # LONG_BINPUT, of an empty stack
        b"\x95" + struct.pack("<Q", 2**60),  # FRAME
    ):
        path = tmp_path / "bad.pkl"
        path.write_bytes(b"\x80\x04" + raw)
        refused(path, "not a whole pickle")


def test_nested_tuples_cannot_be_keys_whose_hash_takes_for_ever(tmp_path):
    body = b"N" + b"q\x00h\x00\x86" * 60
    for use in (b"}" + body + b"Ns", b"\x8f(" + body + b"\x90", b"(" + body + b"\x91"):
        path = tmp_path / "bad.pkl"
        path.write_bytes(b"\x80\x04" + use + b".")
        refused(path, "strings")


def test_arrays_hold_numbers_and_are_as_long_as_they_say(tmp_path, canary):
    objects = np.array([Call(os.system, f"touch {canary}")], dtype=object)
    refused(dump(objects, tmp_path / "bad.pkl"), "refused")
    structure = np.zeros(1, [("a", "f4")])
    refused(dump(structure, tmp_path / "bad.pkl"), "refused", "numpy's type")
    for state in (
        (1, (2**40,), np.dtype("f4"), False, b"1234"),
        (1, (-1,), np.dtype("f4"), False, b"1234"),
        (1, (1,), "f4", False, b"1234"),
        (1, (1,), np.dtype("f4"), False, [1]),
        "state",
    ):
        made = Call(np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b", state=state)
        refused(dump(made, tmp_path / "bad.pkl"), "not a whole pickle")
    refused(dump(np.zeros(2, ">f4"), tmp_path / "bad.pkl"), "little-endian")


@pytest.mark.parametrize(
    "raw",
    [b"", b".", b"\x80\x04", b"N", b"(.", b"t.", b"0.", b"e.", b"h\x01.", b"R.", b"\x93.", b"\xff.",
     b"NR.", b"(NNR.", b"]N\x81.", b"}(Nu.", b"}(NNu.", b"PK\x03\x04", b"hello", b"\x80\x04]("],
)  # fmt: skip
def test_damaged_files_are_one_line(tmp_path, raw):
    path = tmp_path / "bad.pkl"
    path.write_bytes(raw)
    refused(path)


def test_a_truncated_network_is_refused_at_every_length(tmp_path):
    whole = edm_pickles.save(KNOWN["edm2"], tmp_path / "net.pkl").read_bytes()
    path = tmp_path / "cut.pkl"
    for share in range(20):
        path.write_bytes(whole[: len(whole) * share // 20])
        refused(path, "not a whole pickle")


def test_a_network_with_any_byte_changed_is_read_or_refused_and_nothing_else(tmp_path, canary):
    network = Persistent("EDMPrecond", {"a": torch.zeros(2), "b": np.zeros(3), "c": np.sqrt(2)})
    raw = dump({"ema": network, "d": nn.ModuleDict()}, tmp_path / "whole.pkl").read_bytes()
    path = tmp_path / "odd.pkl"
    generator = np.random.default_rng(0)
    refusals = 0
    for _ in range(600):
        changed = bytearray(raw)
        for at in generator.integers(len(raw), size=2):
            changed[at] = generator.integers(256)
        path.write_bytes(changed)
        try:
            pickles.read(path)
        except UserError:
            refusals += 1
    assert refusals > 100


def test_files_that_are_not_there_are_named(tmp_path):
    refused(tmp_path / "none.pkl", "No such file")
    refused(tmp_path, "cannot be read")


def test_the_fixtures_really_are_such_pickles(tmp_path):
    """A pickler that finds the original modules would call the original function."""
    path = edm_pickles.save(KNOWN["ddpmpp"], tmp_path / "net.pkl")
    with foreign(), pytest.raises(AssertionError, match="executed"):
        pickle.loads(path.read_bytes())
