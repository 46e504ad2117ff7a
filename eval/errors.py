"""What a metric says when it is asked for a number that it cannot give."""


class MetricError(ValueError):
    """Bad input to a metric or protocol; the message is one line that names the remedy."""
