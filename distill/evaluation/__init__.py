"""Figures of students and teachers, and what a finished run writes."""
