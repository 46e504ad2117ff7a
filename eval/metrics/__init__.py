"""Metrics, one file each, and the feature extractors that they share."""
