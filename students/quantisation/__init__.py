"""Networks in few bits: rounding, what each layer loses by it, and the bits that each gets."""
