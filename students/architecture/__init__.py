"""Students of another architecture than their teacher's: smaller ones, and other networks."""
