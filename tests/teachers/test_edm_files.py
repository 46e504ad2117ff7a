"""EDM files that are whole pickles and hold no network that can be read."""

import pytest
from torch import nn

from teachers.edm import checkpoints, pickles
from tests.helpers import edm_pickles
from tests.helpers.edm_pickles import Persistent, dump
from tests.helpers.refusals import refused

KNOWN, _ = edm_pickles.golden()


def module(**modules):
    parts = {"_parameters": {}, "_buffers": {}, "_modules": modules}
    return Persistent("EDMPrecond", parts)


def test_modules_that_hold_each_other_are_refused(tmp_path):
    node = module()
    for _ in range(60):  # 2⁶⁰ names, of sixty modules
        node = module(left=node, right=node)
    found = pickles.read(dump(node, tmp_path / "bad.pkl"))
    with refused("bad.pkl", "without"):
        checkpoints.tensors(found, "bad.pkl")
    ring = nn.ModuleDict()
    ring.__dict__.update(_modules={"next": ring}, _parameters={}, _buffers={})
    found = pickles.read(dump(ring, tmp_path / "bad.pkl"))
    with refused("bad.pkl", "next"):
        checkpoints.tensors(found, "bad.pkl")


deeper = Persistent("EDMPrecond", {"_init_args": (), "_init_kwargs": {"x": [[[[[]]]]]}})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], ("*/other.pkl", "'ema'")),
        ({"ema": {"a": 1}}, ("*/other.pkl", "'ema'")),
        ({"net": module()}, ("*/other.pkl", "'ema'")),
        ({"ema": Persistent("VPPrecond", {})}, ("*/other.pkl", "VPPrecond")),
        ({"ema": module()}, ("*/other.pkl", "init_kwargs")),
        (
            {"ema": deeper},
            ("*/other.pkl", "plain"),
        ),
    ],
)  # fmt: skip
def test_a_pickle_without_a_network_that_we_know_is_refused(tmp_path, content, said):
    path = dump(content, tmp_path / "other.pkl")
    with refused(*said):
        checkpoints.convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_network_larger_than_its_tensors_is_refused_without_being_built(tmp_path):
    case = dict(KNOWN["adm"])
    case["arguments"] = case["arguments"] | {"model_channels": 60_000}  # 2 TB of weights
    path = edm_pickles.save(case, tmp_path / "huge.pkl")
    with refused("*/huge.pkl", "stem.weight", "16", "3"):
        checkpoints.convert(path, tmp_path / "out")
