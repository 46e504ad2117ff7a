"""Training data: items found, read, encoded, cached, and handed out as batches."""
