"""The emoji: captioned pictures of about 1,400 concepts in five styles, and networks that read them."""
