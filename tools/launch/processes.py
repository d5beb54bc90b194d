#!/usr/bin/env python
"""Start a script in several processes on this machine and wait for them. `deepy.py` does the same without this command; `--dry-run` shows it.

python tools/launch/processes.py --processes 2 --master_port 29500 train.py -d configs a.yml
python tools/launch/processes.py train.py -d configs a.yml         one process, whose place the environment says (under torchrun)
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.launcher.local import main
from megatron.script import exit_status

if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(sys.argv[1:])))
