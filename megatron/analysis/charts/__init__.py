"""Charts as plain data, and their two forms: interactive in a page, and a PNG."""
