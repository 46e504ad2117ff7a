"""Small teachers trained from nothing: `distill teach`."""
