"""Students of another architecture than their teacher's: smaller ones, with its weights."""
