"""Metrics and protocols, from samples to numbers. It imports nothing else of this project."""
