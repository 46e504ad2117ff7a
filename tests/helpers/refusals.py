"""Refusals, as tests expect them: by the place that the message names, and by its values.

The wording of a message is free to improve; a test asserts none of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from teachers.errors import UserError

Key = str | re.Pattern[str]
# What a user is to do stands behind a semicolon; or the message says what was expected, or which
# values are known.
REMEDY = re.compile(r"; \S|\bexpected |\bknown: |\bdid you mean ")


def check_place(message: str, key: Key, *fragments: object) -> None:
    """Assert that a message is of one line, names this place, and holds each fragment.

    Args:
        key: The place (`UserError.key`), of which "*" is any part; or a pattern of all of it.
        fragments: Values that the message repeats: names, numbers, files.
    """
    place = UserError(message).key
    if isinstance(key, str):
        key = re.compile(".*".join(map(re.escape, key.split("*"))), re.DOTALL)
    assert key.fullmatch(place), f"the place is {place!r}, not {key.pattern!r}: {message}"
    assert "\n" not in message
    for fragment in fragments:
        assert str(fragment) in message, f"{fragment} is not in: {message}"


def check_message(message: str, key: Key, *fragments: object) -> None:
    """Assert the same, and that a fault and a remedy follow the place."""
    check_place(message, key, *fragments)
    place = UserError(message).key
    fault = message[message.index(place) + len(place) :]
    assert len(fault) > 10 and REMEDY.search(fault), f"no fault and remedy: {message}"


@contextmanager
def refused(key: Key, *fragments: object) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect a UserError of this place, whose message holds each of these values."""
    with pytest.raises(UserError) as caught:
        yield caught
    check_message(str(caught.value), key, *fragments)


def refused_line(stderr: str, key: Key, *fragments: object) -> None:
    """Assert that a command wrote one such line to stderr, and nothing else.

    It may be an error of metrics or of the command line itself, which need not say a remedy.
    """
    assert stderr.startswith("distill: ") and stderr.count("\n") == 1, stderr
    check_place(stderr.removeprefix("distill: ").rstrip("\n"), key, *fragments)
