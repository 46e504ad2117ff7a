"""Sampling of teachers and students: samplers, few-step timesteps, baselines, speed."""
