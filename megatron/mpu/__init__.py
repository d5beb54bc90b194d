"""Parallelism: where this process stands among the others, and the pieces of the model that know about it."""
