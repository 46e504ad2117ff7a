"""Shared by tests: first_broken."""

BROKEN = ("broken", "untrained?")


def first_broken(checks):
    return next((c.remedy for c in checks if c.verdict in BROKEN), "")
