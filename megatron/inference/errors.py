"""Errors of a request for text or for a measurement."""

from __future__ import annotations


class InferenceError(ValueError):
    """A model, prompt or text file cannot be used. The message says which one and what to do."""
