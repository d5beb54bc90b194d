"""What can go wrong in a conversion, as sentences for the user."""

from __future__ import annotations


class ConversionError(ValueError):
    """A model that cannot be converted, or a conversion that came out wrong; the message says what and what to do."""
