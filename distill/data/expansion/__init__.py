"""A few captions of the user, expanded into the prompts of a run without a language model."""
