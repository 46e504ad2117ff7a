"""Small teachers trained from scratch: `distill teach`."""
