"""Networks of diffusers in other forms: without some layers, with others, or run in other ways."""
