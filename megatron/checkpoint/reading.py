"""Reading a checkpoint's files without running anything inside them.

`torch.load(weights_only=True)` builds tensors and plain containers only; the few classes that GPT-NeoX's files hold besides (NumPy's random state,
arguments as objects, DeepSpeed's loss scalers and enumerations) are listed here by name. Weights are read with stand-ins for all but NumPy's, so that
inference needs no DeepSpeed.
"""

from __future__ import annotations

import errno
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.checkpoint.errors import CheckpointError

ARGUMENT_CLASSES = ("argparse.Namespace", "types.SimpleNamespace", "megatron.neox_arguments.arguments.NeoXArgs")
DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
    "deepspeed.runtime.zero.offload_config.OffloadDeviceEnum",
    "deepspeed.runtime.bf16_optimizer.fragment_address",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
NO_MEMORY = ("not enough memory", "Cannot allocate memory", "unable to mmap")
"""What PyTorch says of a file that is whole and does not fit the memory."""
MAX_NAMED = 4


class Opaque:
    """Stands for an object that reading weights does not need; what it holds lies in its attributes, what it was made from in `values`."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def numpy_classes() -> list[Any]:
    """What NumPy's arrays and numbers consist of in a pickle: NeoX stores NumPy's random state as an array."""
    functions = {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    old_and_new = [(function, f"numpy.{core}.multiarray.{name}") for name, function in functions.items() for core in ("core", "_core")]
    kinds = (np.bool_, np.uint8, np.uint32, np.uint64, np.int32, np.int64, np.float32, np.float64)
    return [np.ndarray, np.dtype, *{type(np.dtype(kind)) for kind in kinds}, *old_and_new]


def read_file(file: Path, *, mmap: bool, classes: list[Any] | None = None, device: str = "cpu") -> Any:
    """What a `.pt` file holds, on the CPU. `classes`: the real DeepSpeed classes; stand-ins take their place when None. `device` "meta": the tensors
    without their numbers.

    `mmap` reads a tensor's bytes when they are used; only for tensors that do not outlive the file. Raises CheckpointError.
    """
    stand_ins = [(Opaque, name) for name in (*ARGUMENT_CLASSES, *(DEEPSPEED_CLASSES if classes is None else ()))]
    allowed = [*numpy_classes(), *stand_ins, *(classes or ())]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location=device, weights_only=True, mmap=mmap and zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(file, error, allowed)) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing.") from error
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # EINVAL: PyTorch goes to a place before the beginning of a file that was cut short
            raise CheckpointError(f"{file} cannot be read: it is damaged, or not a PyTorch file ({error}).") from error
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if any(words in reason for words in NO_MEMORY):
            raise CheckpointError(f"{file} cannot be read: there is not enough memory for it ({reason[:200]}).") from error
        raise CheckpointError(f"{file} cannot be read: it is damaged, or not a PyTorch file ({reason[:200]}).") from error


def _refusal(file: Path, error: Exception, allowed: list[Any]) -> str:
    """Which types a file holds that are not read, and what to do about it."""
    try:
        with torch.serialization.safe_globals(allowed):
            unknown = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
    except (ValueError, OSError, RuntimeError, pickle.UnpicklingError):
        unknown = []  # not in today's format: what stopped the reading is named instead
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    stopped = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), " ".join(lines))
    return (
        f"{file} is refused: it holds objects other than tensors, numbers, text and lists. Reading them could run code "
        f"({', '.join(unknown[:MAX_NAMED]) or stopped[:300]}). If you trust the person who wrote it, remove these objects with the "
        "program that wrote it: "
        "`state = torch.load(file, weights_only=False)`, delete the entry that holds it, `torch.save(state, file)`."
    )
