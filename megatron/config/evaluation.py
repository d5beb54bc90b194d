"""What eval.py measures."""

from __future__ import annotations

from typing import Literal

from megatron.config.section import PositiveInt, Section


class EvaluationConfig(Section):
    eval_text_files: list[str] | None = None
    """Files whose loss, perplexity and bits per byte eval.py reports: text, JSON lines or parquet, compressed or not. None: an error in eval.py."""
    eval_text_format: Literal["auto", "text", "json"] = "auto"
    """Format of `eval_text_files`. auto: the first bytes of a file decide. text: plain text. json: JSON with the texts under `eval_jsonl_key`."""
    eval_jsonl_key: str = "text"
    """Key of the text in a JSON line or parquet row of `eval_text_files`."""
    eval_stride: PositiveInt | None = None
    """Number of tokens that the window moves by. A smaller number gives every token more context. With `seq_length` the windows do not overlap.
    None: half of `seq_length`."""
    eval_results_prefix: str = ""
    """Start of the name of the results file."""
