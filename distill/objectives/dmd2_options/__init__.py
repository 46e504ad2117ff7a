"""The gradient that DMD2 matches distributions by, and its options, a file to an option."""
