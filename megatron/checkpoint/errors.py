"""What can be wrong with a checkpoint: one family of errors, each a sentence for the person reading it."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found or loaded; says which file or key, and what to do."""


class NoCheckpointError(CheckpointError):
    """There is no checkpoint at all, whole or damaged: a run may start from the beginning."""


class RunLockError(CheckpointError):
    """Another run holds the directory, or the lock cannot be taken."""
