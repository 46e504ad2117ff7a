"""The emoji: captioned pictures of about 1,350 concepts in five styles, and their readers."""
