#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3.
# A good engineer guesses: AutoTokenizer loads the class that tokenizer_config.json names, and PreTrainedTokenizerFast reads text as tokenizer.json says.
# What happens: where config.json says model_type qwen2, AutoTokenizer takes Qwen2Tokenizer all the same. That class splits every digit off, so a
# tokenizer.json with a token for "12" never gives it. With the same two files, model_type qwen3 or llama gives it.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 2>/dev/null
cat > "$work/run.py" <<'PYTHON'
import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE({**letters, "12": 256, "<|endoftext|>": 257}, [("1", "2")]))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer.add_special_tokens(["<|endoftext|>"])
for model_type in ("llama", "qwen3", "qwen2"):
    folder = Path(tempfile.mkdtemp())
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(folder)
    print(f"{model_type}: {type(loaded).__name__}, 12 is {loaded.convert_ids_to_tokens(loaded.encode('12'))}")
PYTHON
cd "$work"
HF_HUB_OFFLINE=1 TMPDIR="$work" venv/bin/python run.py 2>/dev/null > seen
cat seen
diff seen - <<'EXPECTED'
llama: TokenizersBackend, 12 is ['12']
qwen3: TokenizersBackend, 12 is ['12']
qwen2: Qwen2Tokenizer, 12 is ['1', '2']
EXPECTED
echo "as described"
