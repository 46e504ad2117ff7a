"""The shipped recipes: YAML files, found by name."""
