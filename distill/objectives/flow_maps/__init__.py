"""The student jumps between any two times of a path: methods of two times."""
