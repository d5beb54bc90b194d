"""What can be wrong with a request for text or for a measurement."""

from __future__ import annotations


class InferenceError(ValueError):
    """A model, prompt or text file that cannot be used; says which one and what to do."""
