"""Conditions are moved, cut and joined entry by entry, and none stays none."""

import pytest
import torch

from teachers import conditions
from teachers.denoiser import Denoiser, Guided
from teachers.guidance import Adaptive
from teachers.process import Linear

COND = {"a": torch.arange(6).reshape(3, 2), "b": torch.tensor([1.0, 2.0, 3.0])}


def test_rows_are_those_of_every_entry():
    cut = conditions.rows(COND, slice(1, None))
    assert cut["a"].tolist() == [[2, 3], [4, 5]] and cut["b"].tolist() == [2.0, 3.0]
    chosen = conditions.rows(COND, torch.tensor([True, False, True]))
    assert chosen["a"].tolist() == [[0, 1], [4, 5]] and chosen["b"].tolist() == [1.0, 3.0]


def test_joined_conditions_are_one_after_the_other():
    two = conditions.joined(COND, conditions.rows(COND, slice(0, 1)))
    assert two["b"].tolist() == [1.0, 2.0, 3.0, 1.0]
    assert two["a"].shape == (4, 2) and two["a"].dtype == torch.int64


def test_an_entry_that_one_of_them_lacks_is_an_error():
    with pytest.raises(KeyError, match="b"):
        conditions.joined(COND, {"a": COND["a"]})


def test_no_condition_stays_none():
    assert conditions.moved(None, "cpu") is None and conditions.rows(None, 0) is None
    assert conditions.joined(None, COND) is None and conditions.joined(COND, None) is None


def test_moving_reaches_every_entry_and_copies_none_that_is_there():
    assert conditions.moved(COND, "cpu")["a"] is COND["a"]
    assert {v.device.type for v in conditions.moved(COND, "meta").values()} == {"meta"}


def test_an_entry_is_taken_out_and_the_others_stay():
    entry, rest = conditions.without(COND, "b")
    assert entry is COND["b"] and list(rest) == ["a"] and len(COND) == 2
    assert conditions.without(COND, "c") == (None, COND)
    assert conditions.without(None, "a") == (None, None)
    assert conditions.without({"b": COND["b"]}, "b")[1] is None


def test_entries_of_the_negative_branch_stand_apart_under_their_plain_names():
    cond = {"text": torch.ones(2), "negative.text": torch.zeros(2), "picture": torch.ones(2, 3)}
    plain, negative = conditions.branches(cond)
    assert plain.keys() == {"text", "picture"} and plain["text"] is cond["text"]
    assert negative == {"text": cond["negative.text"]}


class Heard(Denoiser):
    """Keeps the conditions that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.process, self.seen = Linear(), {}

    def forward(self, x_t, t, cond=None, s=None):
        self.seen = cond
        return x_t


@pytest.mark.parametrize("own", [False, True], ids=["one negative", "its own negatives"])
@pytest.mark.parametrize("adaptive", [False, True], ids=["guided", "adaptive"])
def test_guidance_keeps_the_picture_and_changes_the_text(own, adaptive):
    heard = Heard()
    null = {"text": torch.full((1, 2), -1.0), "picture": torch.zeros(1, 3)}
    guided = Guided(heard, 3.0, null)
    cond = {"text": torch.arange(4.0).reshape(2, 2), "picture": torch.arange(6.0).reshape(2, 3)}
    negative = torch.tensor([[-2.0, -2.0], [-3.0, -3.0]])
    more = {"negative.text": negative} if own else {}
    x_t, t = torch.randn(2, 1, 2, 2), torch.tensor([0.3, 0.6])
    (Adaptive(guided) if adaptive else guided)(x_t, t, {**cond, **more})
    assert heard.seen.keys() == {"text", "picture"}
    assert torch.equal(heard.seen["picture"], torch.cat([cond["picture"], cond["picture"]]))
    want = negative if own else torch.full((2, 2), -1.0)
    assert torch.equal(heard.seen["text"], torch.cat([cond["text"], want]))
