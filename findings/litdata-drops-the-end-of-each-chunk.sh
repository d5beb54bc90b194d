#!/usr/bin/env bash
# litdata 0.2.76. A corpus is written for `TokensLoader`, which is to stream it in blocks of `block_size` tokens.
# A good engineer guesses: the blocks run through the corpus, and at most the last block_size - 1 tokens of all are left over.
# What happens: every chunk begins a block of its own, and the rest of each chunk is never read (`dim // block_size` blocks). With small chunks or long
# contexts whole documents are missing; with the usual chunks of 64 MB and 2,048 tokens it is about 0.01 % of the tokens, and the same ones in every epoch.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 2>/dev/null
"$work/venv/bin/pip" install -qq --disable-pip-version-check --no-deps litdata==0.2.76 lightning-utilities==0.15.3 filelock==4.3.1 boto3==1.44.8 botocore==1.44.8 \
    jmespath==1.1.0 s3transfer==0.19.3 python-dateutil==4.0.0 six==1.17.0 tifffile==2026.3.3 obstore==0.12.1 requests==2.34.2 urllib3==2.8.0 \
    charset-normalizer==3.5.3 idna==3.20 certifi==2026.10.19.post1 packaging typing_extensions 2>/dev/null
cat > "$work/run.py" <<'PYTHON'
import torch
from litdata import StreamingDataset, TokensLoader
from litdata.streaming.writer import BinaryWriter

writer = BinaryWriter("corpus", chunk_bytes=1000, item_loader=TokensLoader())
for number in range(10):
    writer.add_item(number, torch.full((30,), number, dtype=torch.int32))
writer.done()
writer.merge()
for block in (30, 64):
    read = torch.cat([row for row in StreamingDataset("corpus", item_loader=TokensLoader(block_size=block), shuffle=False)])
    missing = sorted(set(range(10)) - set(read.tolist()))
    print(f"300 tokens written, blocks of {block}: {len(read)} read; documents of which no token is read: {missing or 'none'}")
PYTHON
cd "$work"
HOME="$work" OMP_NUM_THREADS=1 venv/bin/python run.py 2>/dev/null > seen
cat seen
diff seen - <<'EXPECTED'
300 tokens written, blocks of 30: 300 read; documents of which no token is read: none
300 tokens written, blocks of 64: 192 read; documents of which no token is read: [7, 8, 9]
EXPECTED
echo "as described"
