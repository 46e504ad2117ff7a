"""Rewards of users, each in a file: a folder of its own, since it becomes a place of imports."""
