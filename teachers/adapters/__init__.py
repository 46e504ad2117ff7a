"""LoRA files of the user, as parts of a teacher's frozen weights."""
