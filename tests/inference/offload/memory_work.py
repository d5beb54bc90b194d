"""Generates with experts that are larger than the memory it may take, in a process of its own, and prints its peak as JSON."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from megatron.config import config_from_dict
from megatron.inference.model import load_ready_model
from megatron.inference.offload.counters import total
from megatron.model.attention import build_cache


@torch.inference_mode()
def main(keys: dict[str, Any]) -> None:
    ready = load_ready_model(config_from_dict(keys))
    assert ready.offloaded is not None
    caches = build_cache(ready.sizes, 1, 64, dtype=ready.dtype)
    tokens = list(range(24))
    for _ in range(12):
        logits = ready.gpt(torch.tensor([tokens]), cache=caches).logits_BSV
        assert logits is not None
        tokens = [int(logits[0, -1].argmax())]
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    result = {"peak": int(peak[1]) * 1024, "slots": ready.offloaded.slots, **total(ready.offloaded.counters).content()}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
