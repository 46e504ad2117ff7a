"""Fixtures of the tests of exported files: pipelines of Stable Diffusion and SDXL."""

from tests.helpers.formats import folder, pipe

__all__ = ["folder", "pipe"]
