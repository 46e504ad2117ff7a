"""What an objective is, the formulas that several share, and the methods in folders."""
