"""How the processes of a run agree on what happened during a save or a load."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron.checkpoint.errors import CheckpointError
from megatron.config import disk

T = TypeVar("T")


def rank() -> int:
    """This process's number; 0 outside a distributed run."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the run has; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank, in rank order. A collective call, and so a barrier."""
    if world_size() == 1:
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], T], *, only_rank: int | None = None) -> T | None:
    """Runs `work` on every rank (or on one) and raises its CheckpointError or OSError, as CheckpointError, on all ranks.

    A rank that did not run `work` returns None. Without this a full disk on one rank would leave the others waiting for ever.
    """
    result, failure, error_class = None, None, CheckpointError
    if only_rank is None or rank() == only_rank:
        try:
            result = work()
        except CheckpointError as error:
            failure, error_class = str(error), type(error)
        except OSError as error:
            failure = disk.sentence(error)
    raise_first(gather((failure, error_class)))
    return result


def raise_first(failures: list[tuple[str | None, type[CheckpointError]]]) -> None:
    """Raises the first rank's failure, the same on every rank; other ranks' failures are counted."""
    real = [(number, message, error_class) for number, (message, error_class) in enumerate(failures) if message is not None]
    if not real:
        return
    number, message, error_class = real[0]
    where = f" (on rank {number}; {len(real)} of {len(failures)} ranks failed)" if len(failures) > 1 and len(real) < len(failures) else ""
    raise error_class(f"{message}{where}")
