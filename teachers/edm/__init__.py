"""EDM, EDM2 and ADM: networks, published files, and their diffusers forms."""
