"""Networks of diffusers without some of their layers, or on coefficients of their images."""
