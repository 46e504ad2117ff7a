"""Does a teacher denoise as its config says? Checks, and the evidence for them."""
