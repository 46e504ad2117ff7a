"""Early stop: scores of a student against its teacher during training, and when training stops."""
