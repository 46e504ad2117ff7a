"""The student's samples get the teacher's distribution: DMD2, f-distill, SiD."""
