"""Networks of diffusers without some of their layers, or with others in another form."""
