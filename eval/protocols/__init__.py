"""Protocols: prompts to sample, references to compare with, metrics to compute."""
