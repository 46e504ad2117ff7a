"""`distill auto`: a recipe for a model, a card and some hours, with the reason for every choice."""
