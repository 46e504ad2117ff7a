"""Students of a finished run's saved weights: averages after training, searched combinations."""
