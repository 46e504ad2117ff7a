"""Rewards: what the student's images shall raise, beside its objective."""
