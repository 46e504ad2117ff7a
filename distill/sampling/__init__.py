"""Samples of teachers and students: solvers, few-step timesteps, baselines, speed."""
