"""Pictures that come in pairs: their partners among files, and the masks of inpainting."""
