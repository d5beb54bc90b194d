#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, CPU. Settings of attention heads that one half of a class reads and the other does not.
# A good engineer guesses: a class either obeys `head_dim` and `partial_rotary_factor`, or ignores them.
# What happens:
# - GPT-NeoX: the table of rotary angles obeys `head_dim`, the projections do not. Nothing fails; the model computes something else.
# - OLMoE: the projections obey `head_dim`, the norms of queries and keys are sized by hidden_size. The forward pass fails.
# - Llama: `partial_rotary_factor` changes nothing with the default positions. With rope_type linear it is obeyed by half, and the forward pass fails.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 2>/dev/null
cat > "$work/run.py" <<'PYTHON'
import torch
import transformers

TOKENS = torch.arange(8)[None]
SIZES = {"vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}


def logits(kind, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **settings)
    with torch.no_grad():
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval()(TOKENS).logits


def outcome(kind, plain, **settings):
    try:
        return "other logits" if not torch.equal(logits(kind, **settings), logits(kind, **plain)) else "the same logits"
    except RuntimeError as error:
        return f"RuntimeError: {str(error).split(' at ')[0]}"


experts = {"num_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0, "eos_token_id": 0}
print("GPT-NeoX, head_dim 8 in place of 16:", outcome("GPTNeoX", {}, head_dim=8))
print("OLMoE, head_dim 8 in place of 16:", outcome("Olmoe", experts, head_dim=8, **experts))
print("Llama, partial_rotary_factor 0.5:", outcome("Llama", {}, partial_rotary_factor=0.5))
print("Llama, partial_rotary_factor 0.5, linear:", outcome("Llama", {}, rope_parameters=LINEAR))
PYTHON
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 venv/bin/python run.py 2>/dev/null > seen
cat seen
diff seen - <<'EXPECTED'
GPT-NeoX, head_dim 8 in place of 16: other logits
OLMoE, head_dim 8 in place of 16: RuntimeError: The size of tensor a (64) must match the size of tensor b (32)
Llama, partial_rotary_factor 0.5: the same logits
Llama, partial_rotary_factor 0.5, linear: RuntimeError: The size of tensor a (16) must match the size of tensor b (8)
EXPECTED
echo "as described"
