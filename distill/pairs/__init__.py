"""Pairs on disk of noise and the sample that the teacher's ODE leads it to, and their source."""
