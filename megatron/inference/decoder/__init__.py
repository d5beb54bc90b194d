"""Decoding on a CPU by compiled code: the model's layers as parts that read every weight once, as it lies in memory (`megatron/kernels/decode`).

parts.py       a module of the model -> what the kernels need of it, or the reason why they cannot serve it
steps.py       one layer as a few calls; a part that the kernels do not serve is the model's own module
build.py       a model -> its steps                runner.py   prompts and new tokens through these steps
"""

from __future__ import annotations
