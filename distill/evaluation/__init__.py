"""Measurement of students and teachers, and the files of a finished run."""
