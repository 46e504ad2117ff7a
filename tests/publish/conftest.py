"""Fixtures of the tests of uploads: a Hub on this machine, and pauses that take no time."""

from tests.helpers.pushes import hub, pauses

__all__ = ["hub", "pauses"]
