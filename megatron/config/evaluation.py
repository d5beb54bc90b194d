"""What eval.py measures."""

from __future__ import annotations

from typing import Literal

from megatron.config.section import PositiveInt, Section


class EvaluationConfig(Section):
    eval_text_files: list[str] | None = None
    """Files whose loss, perplexity and bits per byte eval.py reports: text, JSON lines, parquet, compressed ones too. None: none are named here."""
    eval_text_format: Literal["auto", "text", "json"] = "auto"
    """What is in `eval_text_files`: what their first bytes say (auto), plain text, or JSON with the texts under `eval_jsonl_key`."""
    eval_jsonl_key: str = "text"
    """Where the text is in a JSON line or parquet row of `eval_text_files`."""
    eval_stride: PositiveInt | None = None
    """Tokens that the window moves by; smaller gives every token more context, `seq_length` lets windows not overlap. None: half of `seq_length`."""
    eval_results_prefix: str = ""
    """Start of the name of the results file."""
