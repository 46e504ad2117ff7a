"""Networks of diffusers in other forms: without some layers, or on coefficients of images."""
