"""Protocols: which samples are drawn, what they are compared with, which metrics are taken."""
