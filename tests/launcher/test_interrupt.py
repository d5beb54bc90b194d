"""Ctrl-C while a command line still loads its configuration is a sentence, not a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODEL = "num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nseq_length: 32\nmax_position_embeddings: 32\n"


@pytest.mark.parametrize("words", [("deepy.py", "train.py"), ("train.py",), ("generate.py",), ("eval.py",)], ids=lambda words: words[0])
def test_interrupted_while_the_configuration_is_loaded(words: tuple[str, ...], tmp_path: Path, repository: Path) -> None:
    # Where the tests run in the background, the shell has them and their children ignore Ctrl-C: undo that first.
    listening = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    (tmp_path / "interrupting.py").write_text(f"import os, signal\n{listening}\nos.kill(os.getpid(), signal.SIGINT)\n")
    (tmp_path / "a.yml").write_text(MODEL + "plugins: [interrupting]\n")
    environment = os.environ | {"PYTHONPATH": f"{repository}{os.pathsep}{tmp_path}"}
    command = [sys.executable, *(str(repository / word) for word in words), str(tmp_path / "a.yml")]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stderr) == (130, "\nInterrupted.\n")
