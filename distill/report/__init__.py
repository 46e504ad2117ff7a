"""The HTML page of a run, and its training curves beside known-good ones."""
