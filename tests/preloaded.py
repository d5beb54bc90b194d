"""What the processes of `run_distributed` find done in the tests: the imports and the probing with which every training run begins.

Importing it all again in each process takes longer than most tests. Only what leaves no thread behind may stand here: the processes are copies of
one that has imported this, and threads are not copied.
"""

from __future__ import annotations

import gc

import matplotlib.pyplot  # noqa: F401
import torch._dynamo  # noqa: F401

import megatron.training.run  # noqa: F401
from megatron.training.process import decline_compiled_collectives, import_muon_without_compiling

decline_compiled_collectives()
import_muon_without_compiling()
gc.freeze()  # a collection in a copy would touch, and so really copy, every object that was imported
