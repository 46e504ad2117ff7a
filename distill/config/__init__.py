"""Recipes: YAML in, checked settings out. Nothing here loads a network."""
