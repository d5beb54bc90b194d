#!/usr/bin/env bash
# torch 2.13.0, CPU.
# A good engineer guesses: a program that never compiles does not load PyTorch's compiler; an optimizer over one parameter costs nothing.
# What happens: the first optimizer that is made loads `torch._dynamo`, and with it sympy, `torch._inductor` and `torch.onnx` (Triton too, where it is
# installed; not tested here). `add_param_group`, which every optimizer calls, is marked "not to be compiled", and the mark imports the compiler at its
# first call (torch/_compile.py). Every rank grows by more than 50 MiB, for good, and training starts about a second later.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null
cat > "$work/run.py" <<'PYTHON'
import os
import sys

import torch


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


LOADED = ("torch._dynamo", "torch._inductor", "torch.onnx", "sympy")
weight = torch.nn.Parameter(torch.zeros(1))
weight.sum().backward()
print("before:", [name for name in LOADED if name in sys.modules])
before = resident()
torch.optim.SGD([weight], lr=0.1)
print("after an optimizer was made:", [name for name in LOADED if name in sys.modules])
print("more than 50 MiB:", resident() - before > 50)
PYTHON
"$work/venv/bin/python" "$work/run.py" 2>/dev/null | tee "$work/seen"
diff "$work/seen" - <<'EXPECTED'
before: []
after an optimizer was made: ['torch._dynamo', 'torch._inductor', 'torch.onnx', 'sympy']
more than 50 MiB: True
EXPECTED
echo "as described"
