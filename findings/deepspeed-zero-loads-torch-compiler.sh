#!/usr/bin/env bash
# DeepSpeed 0.19.8 with torch 2.13.0, CPU and gloo, torch.optim.AdamW.
# A good engineer guesses: an optimizer that a run does not use costs it nothing, and importing code that torch.compile may compile later does not load
# the compiler.
# What happens: deepspeed.initialize() with ZeRO imports the Muon optimizer, whose module decorates functions when it is imported. This loads torch's
# inductor, in every process: about 2 s of processor time. ZeRO stage 0 does not.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 setuptools==84.2.1 deepspeed==0.19.8 2>/dev/null
cat > "$work/run.py" <<'PYTHON'
import sys

import deepspeed
import torch

deepspeed.init_distributed("gloo")
for stage in (0, 1):
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    config = {"train_batch_size": 1, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    loaded = [name for name in ("deepspeed.runtime.zero.muon.muon_optimizer", "torch._inductor.compile_fx") if name in sys.modules]
    print(f"stage {stage}: loaded {loaded}")
PYTHON
cd "$work"
DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + RANDOM % 20000)) OMP_NUM_THREADS=1 \
    venv/bin/python run.py 2>/dev/null | grep stage > seen
cat seen
diff seen - <<'EXPECTED'
stage 0: loaded []
stage 1: loaded ['deepspeed.runtime.zero.muon.muon_optimizer', 'torch._inductor.compile_fx']
EXPECTED
echo "as described"
