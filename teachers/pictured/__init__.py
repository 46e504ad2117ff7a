"""Pipelines that take a picture as a condition, one file for each family."""
