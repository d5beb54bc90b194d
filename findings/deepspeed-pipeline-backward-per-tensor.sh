#!/usr/bin/env bash
# DeepSpeed 0.19.8 with torch 2.13.0, CPU and gloo, two processes.
# A good engineer guesses: a pipeline stage that sends several tensors (hidden states, auxiliary losses) runs one backward pass with all of their
# gradients, as torch.autograd.backward does.
# What happens: PipelineEngine calls tensor.backward(gradient, retain_graph) for each floating tensor of the tuple. Each call runs through the whole
# stage, and its gradients are added to the weights' one after the other.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 setuptools==84.2.1 deepspeed==0.19.8 2>/dev/null
cat > "$work/run.py" <<'PYTHON'
import deepspeed
import deepspeed.ops
import torch
from deepspeed.pipe import LayerSpec, PipelineModule

class First(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.backwards = 0
        self.linear.weight.register_hook(lambda grad: setattr(self, "backwards", self.backwards + 1))
    def forward(self, x):
        y = self.linear(x)
        return y, y.square().mean()[None], y.abs().mean()[None]

class Second(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
    def forward(self, state):
        y, a, b = state
        return self.linear(y).sum() + a.sum() + b.sum()

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
deepspeed.init_distributed("gloo")
model = PipelineModule([LayerSpec(First), LayerSpec(Second)], num_stages=2, partition_method="uniform", loss_fn=lambda out, label: out)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
    "train_batch_size": 2, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}}})
engine.train_batch(iter([(torch.ones(2, 4), torch.ones(2))]))
if engine.stage_id == 0:
    print("passes:", model.forward_funcs[0].backwards)
PYTHON
cd "$work"
DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 venv/bin/python -m torch.distributed.run --nproc_per_node 2 --master_port $((20000 + RANDOM % 20000)) run.py \
    2>/dev/null | grep passes > seen
cat seen
diff seen - <<'EXPECTED'
passes: 3
EXPECTED
echo "as described"
