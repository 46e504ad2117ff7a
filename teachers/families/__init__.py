"""Diffusers pipelines as teachers: one file for each model family."""
