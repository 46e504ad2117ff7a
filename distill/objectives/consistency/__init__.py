"""The student's x̂ is the same at all times of a path: consistency models."""
