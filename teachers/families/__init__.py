"""Pipelines of diffusers as teachers, a file to a family."""
