"""Recipes: reads YAML into checked settings. Nothing here loads a network."""
