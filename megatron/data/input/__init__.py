"""How do files become documents? Formats, compression and archives, which files are meant, and what happens to those that cannot be read."""
