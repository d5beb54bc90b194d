"""What eval.py measures."""

from __future__ import annotations

from megatron.config.section import PositiveInt, Section


class EvaluationConfig(Section):
    eval_text_files: list[str] | None = None
    """Text files whose loss, perplexity and bits per byte eval.py reports. None: they are named on the command line."""
    eval_stride: PositiveInt | None = None
    """Tokens that the window moves by; smaller gives every token more context, `seq_length` lets windows not overlap. None: half of `seq_length`."""
    eval_results_prefix: str = ""
    """Start of the name of the results file."""
