"""Figures as a run leaves them."""

ROW = {
    "fd": 0.2874, "precision": 0.92, "accuracy": 0.978, "images_per_s": 2619.0,
    "spread": {"fd": 0.0198, "precision": 0.0, "accuracy": 0.0},
    "protocol": "digits", "n": 1797, "seeds": 3,
}  # fmt: skip
