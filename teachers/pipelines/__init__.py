"""Diffusers pipelines read by one generic adapter; a family declares what its own pipeline does."""
