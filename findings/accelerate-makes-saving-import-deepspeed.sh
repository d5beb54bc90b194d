#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, deepspeed 0.19.8, torch 2.13.0, CPU.
# A good engineer guesses: whoever saves a plain model on one CPU with `save_pretrained` uses neither accelerate nor DeepSpeed.
# What happens: once the package accelerate is installed beside deepspeed, `save_pretrained` imports all of DeepSpeed, to ask whether the model is one
# of its engines. Saving then takes seconds longer, and fails wherever DeepSpeed cannot be imported. Without accelerate nothing of this happens.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip=("$work/venv/bin/pip" install -qq --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy==2.4.6 setuptools==84.2.1 wheel transformers==5.23.0 2>/dev/null
DS_ACCELERATOR=cpu "${pip[@]}" --no-build-isolation deepspeed==0.19.8 2>/dev/null
cat > "$work/run.py" <<'PYTHON'
import importlib.util
import sys
import tempfile

from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
model = LlamaForCausalLM(LlamaConfig(**sizes))
installed = importlib.util.find_spec("accelerate") is not None
print(f"accelerate installed: {installed}; DeepSpeed imported before saving: {'deepspeed' in sys.modules}")
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
print(f"accelerate installed: {installed}; DeepSpeed imported after saving: {'deepspeed' in sys.modules}")
PYTHON
cd "$work"
run() { HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu venv/bin/python run.py 2>/dev/null | grep '^accelerate installed' >> seen; }
run
"${pip[@]}" accelerate==1.15.0 2>/dev/null
run
cat seen
diff seen - <<'EXPECTED'
accelerate installed: False; DeepSpeed imported before saving: False
accelerate installed: False; DeepSpeed imported after saving: False
accelerate installed: True; DeepSpeed imported before saving: False
accelerate installed: True; DeepSpeed imported after saving: True
EXPECTED
echo "as described"
