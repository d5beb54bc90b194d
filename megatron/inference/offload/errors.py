"""Errors of keeping experts in slow memory."""

from __future__ import annotations

from megatron.inference.errors import InferenceError


class OffloadError(InferenceError):
    """Experts cannot be kept or brought in as asked. The message says which file or number is the reason, and what to do."""
