"""Conditions are moved, cut and joined entry by entry, and none stays none."""

import pytest
import torch

from teachers import conditions

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
