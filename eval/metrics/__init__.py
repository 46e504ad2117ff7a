"""One file to a metric, and the feature extractors that they share."""
