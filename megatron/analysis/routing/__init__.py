"""What the routers of a model do with a text."""
