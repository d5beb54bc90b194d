"""A table for each of Hugging Face's architectures, one a file."""
