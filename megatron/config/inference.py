"""How generate.py writes text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from megatron.config.expert_offload import ExpertOffload
from megatron.config.moe import MoEConfig
from megatron.config.section import Fraction, NaturalInt, NonNegativeFloat, PositiveFloat, PositiveInt, Problem, Section, Seed


class InferenceConfig(Section):
    text_gen_type: Literal["input-file", "interactive", "unconditional"] | None = None
    """Where prompts come from. None: `input-file` when `sample_input_file` is given, else `interactive` on a terminal, else `unconditional`."""
    temperature: NonNegativeFloat = 0.0
    """Logits are divided by this. 0: always take the most likely token; top_k, top_p and min_p then have no effect."""
    top_p: Fraction = 0.0
    """Sample from the smallest set of tokens whose probabilities sum to at least this. 0: off."""
    top_k: NaturalInt = 0
    """Sample from this many most likely tokens. 0: off."""
    min_p: Fraction = 0.0
    """Sample from tokens that have at least this share of the most likely token's probability. 0: off."""
    repetition_penalty: PositiveFloat = 1.0
    """Makes tokens of the prompt and the answer less likely if it is above 1, at every temperature: their logits are divided by it, negative ones
    multiplied. 1: off."""
    stop_strings: list[str] = []
    """The text ends before the first of these strings."""
    maximum_tokens: PositiveInt = 64
    """Largest number of tokens in one continuation."""
    num_samples: PositiveInt = 1
    """Number of continuations for each prompt. With `unconditional`: number of texts."""
    sample_batch_size: PositiveInt = 8
    """Number of continuations that are generated at once. Each of them needs memory for its keys and values."""
    prompt_end: str = "\n"
    """Text that ends a prompt in the input file and in interactive use."""
    sample_input_file: str | None = None
    """File with prompts. None: no file."""
    sample_output_file: str = "samples.txt"
    """File that gets one JSON object per sample."""
    sample_seed: Seed | None = None
    """Seed of the sampling. None: `seed`."""
    expert_offload: ExpertOffload | None = None
    """Generate with experts in slow memory that move in when they are selected, for example {slots: 4} or {memory: 2GB, policy: lfu}.
    docs/offload.md explains the entries. None: all experts are resident."""
    inference_weights: Literal["as_saved", "int8"] = "as_saved"
    """Number format of the weights in generation. int8: each row of a matrix is rounded to 255 steps when the model is loaded, so a new token
    needs half the bytes of bfloat16; on CPUs with the compiled kernels only. eval.py measures what it costs."""

    def check(self) -> Iterator[Problem]:
        if self.expert_offload is not None:
            yield from self.expert_offload.problems()
        if self.text_gen_type == "input-file" and self.sample_input_file is None:
            yield Problem(("text_gen_type", "sample_input_file"), "needs sample_input_file: the file with the prompts")
        if "" in self.stop_strings:
            yield Problem(("stop_strings",), "has an empty string: leave it out, or no text could begin")


def int8_problems(inference: InferenceConfig, moe: MoEConfig) -> Iterator[Problem]:
    """The keys that need the model's own forward, which cannot compute with int8 weights."""
    if inference.inference_weights != "int8":
        return
    named = "kernel_backends.decode: reference" if moe.kernel_backends.get("decode") == "reference" else None
    moved = None if inference.expert_offload is None else inference.expert_offload.forward_only
    for entry in filter(None, (named, moved)):
        message = f"int8 needs the compiled decoder, and {entry} the model's own forward; remove one of the two"
        yield Problem(("inference_weights", entry.split(":")[0]), message)
