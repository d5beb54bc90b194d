"""Reading a checkpoint's files without running anything inside them.

`torch.load(weights_only=True)` builds tensors and plain containers only; the few classes of DeepSpeed and NumPy that its files hold are listed here
by name. Weights are read with stand-ins for DeepSpeed's classes, so that inference needs no DeepSpeed.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.checkpoint.errors import CheckpointError

DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class Opaque:
    """Stands for an object of DeepSpeed's that reading weights does not need."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def numpy_classes() -> list[Any]:
    """What NumPy's arrays consist of in a pickle: NeoX stores NumPy's random state as one."""
    reconstruct = np.empty(0).__reduce__()[0]
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    return [np.ndarray, np.dtype, type(np.dtype(np.uint32)), *((reconstruct, name) for name in names)]


def read_file(file: Path, *, mmap: bool, classes: list[Any] | None = None) -> Any:
    """What a `.pt` file holds, on the CPU. `classes`: the real DeepSpeed classes; stand-ins take their place when None.

    `mmap` reads a tensor's bytes when they are used; only for tensors that do not outlive the file. Raises CheckpointError.
    """
    allowed = [(Opaque, name) for name in DEEPSPEED_CLASSES] if classes is None else classes
    try:
        with torch.serialization.safe_globals([*numpy_classes(), *allowed]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        refused = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), reason)
        raise CheckpointError(
            f"{file} is refused: it holds something other than tensors, numbers, text and lists, which could run code when read ({refused[:300]})."
        ) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing.") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{file} cannot be read: it is damaged or no file of PyTorch's ({reason[:200]}).") from error
