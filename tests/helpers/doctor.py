"""The first check that a teacher fails."""

BROKEN = ("broken", "untrained?")


def first_broken(checks):
    return next((c.remedy for c in checks if c.verdict in BROKEN), "")
