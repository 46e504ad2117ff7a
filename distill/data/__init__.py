"""Training data: lists of items, their encoding, caches of it, and the stream of batches."""
