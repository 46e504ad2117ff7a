"""Samples in, numbers out. Stands alone: nothing here imports the rest of the project."""
