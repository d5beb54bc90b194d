#!/usr/bin/env bash
# DeepSpeed 0.19.8, bf16, ZeRO stage 0 (its default), torch.optim.AdamW, CPU and gloo.
# A good engineer guesses: deepspeed.initialize() wraps the optimizer and leaves its state and the weights alone.
# What happens: the unfused 16-bit wrapper takes one optimizer step with zero gradients while the engine is built. Adam's counter starts at 1, so the
# first real update has the size of a second one, and decoupled weight decay shrinks every weight once before step 1. ZeRO stage 1 and fp32 do neither.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 setuptools==84.2.1 deepspeed==0.19.8 2>/dev/null
cat > "$work/run.py" <<'PYTHON'
import deepspeed
import torch

deepspeed.init_distributed("gloo")
for precision, stage in (("bf16", 0), ("bf16", 1), ("fp32", 0)):
    model = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    torch.nn.init.ones_(model.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=1.0)
    config = {"train_batch_size": 1, "bf16": {"enabled": precision == "bf16"}, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    steps = [int(state["step"]) for state in optimizer.state.values()]
    weight = optimizer.param_groups[0]["params"][0].flatten()[0].item()
    print(f"{precision} stage {stage}: steps taken before training {steps}, a master weight that was 1 is {weight:.2f}")
PYTHON
cd "$work"
DS_ACCELERATOR=cpu RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + RANDOM % 20000)) OMP_NUM_THREADS=1 \
    venv/bin/python run.py 2>/dev/null | grep stage > seen
cat seen
diff seen - <<'EXPECTED'
bf16 stage 0: steps taken before training [1], a master weight that was 1 is 0.90
bf16 stage 1: steps taken before training [], a master weight that was 1 is 1.00
fp32 stage 0: steps taken before training [], a master weight that was 1 is 1.00
EXPECTED
echo "as described"
