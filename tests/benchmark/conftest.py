"""Fixtures of the tests of benchmarks: a small one, and runs in this process."""

from tests.helpers.benches import file, played

__all__ = ["file", "played"]
