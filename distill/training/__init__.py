"""A training run: built from a recipe, checked, and played step by step."""
