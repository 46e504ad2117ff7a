"""The student's samples match data in frozen features: no fake score and no critic."""
