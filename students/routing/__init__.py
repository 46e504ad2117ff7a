"""Several students of one teacher, each for a part of its conditions, as one pipeline."""
