"""Every teacher that can be loaded, by name; and the shapes of well-known ones."""
