#!/usr/bin/env bash
# datatrove 0.10.1. `DatatroveFileDataset(path, seq_len)` reads a tokenised file in windows, as a PyTorch dataset with a length.
# A good engineer guesses that dataset[len(dataset)] raises IndexError, as a sequence does: then `for row in dataset` reads each window once and ends.
# What happens: the first row beyond the length holds the tokens that did not fill a window, every later one is empty, and a plain `for` goes on with them.
# A DataLoader is not concerned: it asks for the numbers below the length only.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check datatrove==0.10.1 torch==2.13.0 2>/dev/null
cat > "$work/run.py" <<'PYTHON'
from itertools import islice

import numpy as np
from datatrove.utils.dataset import DatatroveFileDataset

np.arange(10, dtype=np.uint16).tofile("tokens.ds")
dataset = DatatroveFileDataset("tokens.ds", seq_len=3)
print("length:", len(dataset))
for number in (1, 2, 3, 1000):
    print(f"row {number}:", dataset[number]["input_ids"].tolist())
print("rows of a plain for, stopped after 50:", sum(1 for _ in islice(dataset, 50)))
PYTHON
cd "$work"
venv/bin/python run.py 2>/dev/null > seen
cat seen
diff seen - <<'EXPECTED'
length: 2
row 1: [4, 5, 6, 7]
row 2: [8, 9]
row 3: []
row 1000: []
rows of a plain for, stopped after 50: 50
EXPECTED
echo "as described"
