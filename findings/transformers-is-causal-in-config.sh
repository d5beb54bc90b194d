#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, CPU.
# A good engineer guesses: LlamaForCausalLM is causal, and a setting that LlamaConfig does not have changes nothing.
# What happens: `is_causal: false` in config.json lets every token of this causal language model see the tokens after it. Nothing is said.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 2>/dev/null
cat > "$work/run.py" <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
for settings in ({}, {"is_causal": False}):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **settings)).eval()
    with torch.no_grad():
        one, other = (model(torch.tensor([[0, later, later]])).logits[0, 0] for later in (5, 9))
    print(f"{settings}: later tokens change the first token's logits: {not torch.equal(one, other)}")
PYTHON
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python run.py 2>/dev/null > seen
cat seen
diff seen - <<'EXPECTED'
{}: later tokens change the first token's logits: False
{'is_causal': False}: later tokens change the first token's logits: True
EXPECTED
echo "as described"
