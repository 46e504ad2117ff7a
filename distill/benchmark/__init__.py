"""Many objectives at one budget: `distill bench`."""
