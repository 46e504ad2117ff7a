"""Source of networks that leaves with a student, for programs that run without our packages."""
