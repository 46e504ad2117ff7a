"""What can be known before a run: memory, time, and whether the teacher is read rightly."""
