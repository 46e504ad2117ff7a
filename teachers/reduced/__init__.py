"""Networks of diffusers from which single layers were removed."""
