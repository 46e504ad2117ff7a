"""What lies on disk or on the Hub: weights, configs and tokenizers, read and checked."""
