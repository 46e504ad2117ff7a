"""One step of the student learns several of the teacher: progressive, guided, latent."""
