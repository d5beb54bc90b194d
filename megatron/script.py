"""What every command line does with failures: a sentence for the user, a traceback only for a bug."""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable

CONFIGURATION_STATUS = 2
FAILURE_STATUS = 1
INTERRUPTED_STATUS = 130
OUT_OF_MEMORY = "There is not enough memory: use a smaller model, a smaller micro-batch or a shorter seq_length"
NO_MEMORY = re.compile(r"((?:you t|T)ried to allocate [\d.]+ \w+)")
"""What PyTorch says when the system, or a GPU, has no memory left."""
SPINS = "7000"
"""How often a thread looks for work before it sleeps: for about 0.2 ms, where OpenMP's own 300,000 times are 7 ms (libgomp, 2 cores of a Zen 4)."""
LOST = re.compile(r"gloo.*Connection (?:reset|closed) by peer", re.DOTALL)
"""What PyTorch says when the other end of a collective operation is gone."""


def exit_status(work: Callable[[], int | None]) -> int:
    """Does `work` and returns the script's exit status: what `work` returns (None is 0), 2 for a mistake in the configuration, 1 for another
    failure, 130 after Ctrl-C.

    An exception whose class this package defines explains itself to the user, so its message alone goes to standard error; so does what the system
    refused (a full disk, a missing permission). Any other exception is a bug and leaves its traceback.
    """
    share_cores()
    try:
        return work() or 0
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        return INTERRUPTED_STATUS
    except BrokenPipeError:  # whoever reads the output has seen enough of it; Python would complain once more while it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE_STATUS
    except OSError as error:
        from megatron.config import disk

        sys.stderr.write(f"{_speaker()}{'' if error.filename else 'The system: '}{disk.sentence(error)}.\n")
        return FAILURE_STATUS
    except MemoryError:
        sys.stderr.write(f"{_speaker()}{OUT_OF_MEMORY}.\n")
        return FAILURE_STATUS
    except Exception as error:
        if (refused := NO_MEMORY.search(str(error))) is not None and isinstance(error, RuntimeError):
            sys.stderr.write(f"{_speaker()}{OUT_OF_MEMORY} ({refused[1]}).\n")
            return FAILURE_STATUS
        if isinstance(error, RuntimeError) and LOST.search(str(error)):
            sys.stderr.write(f"{_speaker()}The connection to another process of this run was lost, because that process has ended.\n")
            return FAILURE_STATUS
        if type(error).__module__.split(".")[0] != "megatron":
            from megatron.config.failures import note_failure

            note_failure(error)
            raise
        if str(error):  # another process of the run, or another thread, has said it already
            sys.stderr.write(f"{_speaker()}{error}\n")
        return CONFIGURATION_STATUS if _is_about_configuration(error) else FAILURE_STATUS


def share_cores() -> None:
    """Lets threads that wait for work sleep soon, so that they do not take the cores from other programs. Before PyTorch is loaded.

    A thread that waits in a loop keeps its core while the thread it waits for has none. Next to two busy programs, 30 tokens that could take 14 s
    take at most 0.4 s, and two trainings on the same cores take 0.85 of the time. What the user says (OMP_WAIT_POLICY, GOMP_SPINCOUNT) stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def at_least_one(text: str) -> int:
    """The type of an option of a command line that counts something: 1,000 and 1_000 are 1000. Raises ArgumentTypeError."""
    digits = text.replace(",", "").replace("_", "")
    if not digits.isdecimal() or int(digits) < 1:
        raise ArgumentTypeError(f"must be a whole number of 1 or more, not '{text}'")
    return int(digits)


def _is_about_configuration(error: Exception) -> bool:
    from megatron.config.section import ConfigError  # not above: this module loads at once, so that Ctrl-C is a sentence from the start

    return isinstance(error, ConfigError)


def _speaker() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[process {rank}] "
