"""Reading and checking weights, configs and tokenizers, on disk or from the Hub."""
