"""What eval.py measures, and which tasks a training run measures on its way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron.config.section import NaturalInt, PositiveInt, Problem, Section


class EvaluationConfig(Section):
    eval_text_files: list[str] | None = None
    """Files whose loss, perplexity and bits per byte eval.py reports: text, JSON lines or parquet, compressed or not. None: no files."""
    eval_text_format: Literal["auto", "text", "json"] = "auto"
    """Format of `eval_text_files`. auto: the first bytes of a file decide. text: plain text. json: JSON with the texts under `eval_jsonl_key`."""
    eval_jsonl_key: str = "text"
    """Key of the text in a JSON line or parquet row of `eval_text_files`."""
    eval_stride: PositiveInt | None = None
    """Number of tokens that the window moves by. A smaller number gives every token more context. With `seq_length` the windows do not overlap.
    None: half of `seq_length`."""
    eval_position_ranges: NaturalInt = 0
    """Loss and perplexity by context length: windows of `seq_length` tokens of each file are cut into this many ranges of positions, each twice as
    long as the one before. 0: not measured."""
    eval_passkey_lengths: list[PositiveInt] | None = None
    """Passkey retrieval: the model must repeat a number that a text of this many tokens hides. None: not measured."""
    eval_passkey_depths: PositiveInt = 5
    """Number of places in the text at which the number is hidden, from its beginning (0 %) to its end (100 %)."""
    eval_passkey_trials: PositiveInt = 10
    """Number of texts for each length and depth."""
    eval_tasks: list[str] | None = None
    """Tasks of lm-evaluation-harness by name or pattern (`piqa`, `mmlu`, `arc_*`). `cosmoes` stands for the ten tasks of the CoSMoEs paper. eval.py
    measures them; a training run does if `eval_tasks_interval` is given. None: no tasks."""
    eval_num_fewshot: NaturalInt | None = None
    """Number of solved examples before each question. None: what the task says, else 0."""
    eval_limit: PositiveInt | None = None
    """Number of documents of each task that are measured, from the first one on. None: all."""
    eval_data: str | None = None
    """Folder with the data of the tasks, in folders named as on the Hugging Face hub (`allenai/ai2_arc`). Then nothing is loaded from the network.
    None: the package datasets loads the data from the hub or from its cache."""
    eval_chat_template: bool = False
    """Puts the questions into the chat template that lies beside the tokenizer."""
    eval_log_samples: bool = False
    """Also writes every document with the answers of the model, one JSON lines file for each task, beside the results."""
    eval_tasks_interval: PositiveInt | None = None
    """Steps between measurements of `eval_tasks` in a training run; the last step is measured too. None: training does not measure them."""
    eval_results_prefix: str = ""
    """Start of the name of the results file."""

    def check(self) -> Iterator[Problem]:
        if self.eval_tasks_interval is not None and not self.eval_tasks:
            yield Problem(("eval_tasks_interval", "eval_tasks"), "needs eval_tasks: the tasks to measure, such as [piqa, arc_easy]")
        if self.eval_tasks is not None and "" in self.eval_tasks:
            yield Problem(("eval_tasks",), "has an empty name; leave it out")
