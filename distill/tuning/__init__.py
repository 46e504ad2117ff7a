"""`distill tune`: a few-step student learns from pictures and keeps its steps."""
