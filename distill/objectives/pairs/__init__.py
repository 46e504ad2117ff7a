"""The student learns from the teacher's own samples, each with the noise that it was made from."""
