"""The student learns from stored pairs of noise and the teacher's sample."""
