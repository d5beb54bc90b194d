"""The work of generate.py: it loads a model and continues prompts from a file or a person, or generates text without prompts."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron.config.inference import InferenceConfig
from megatron.config.neox import NeoXConfig
from megatron.inference.continuation import Continuation, complete, encode_prompt, sample_generator
from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel, load_ready_model
from megatron.inference.prompts import QUIT, Source, choose_source, read_prompts, typed_prompts
from megatron.inference.samples import SampleFile, printable, show
from megatron.inference.sampling import Sampling
from megatron.mpu.groups import current_groups

log = logging.getLogger(__name__)


def generate(config: NeoXConfig, console: Console, read_line: Callable[[str], str], *, terminal: bool) -> None:
    """Generates as the configuration says. `read_line` asks a person for a line. `terminal`: whether there is a terminal.

    The stages of a pipeline call it together. The first one writes.

    Raises the errors of load_ready_model, and InferenceError for prompts and files that cannot be used, if possible before the model is loaded.
    """
    inference = config.inference
    pipe = current_groups().pipe
    source = choose_source(inference, terminal=terminal and pipe.size == 1)
    if source == "interactive" and pipe.size > 1:
        raise InferenceError(
            f"text_gen_type: interactive needs one process, and {pipe.size} run this model; add -o pipe_parallel_size=0, or give the prompts in a "
            "file (sample_input_file)."
        )
    prompts = (
        read_prompts(Path(inference.sample_input_file), inference.prompt_end) if source == "input-file" and inference.sample_input_file else [""]
    )
    ready = load_ready_model(config)
    seed = config.training.seed if inference.sample_seed is None else inference.sample_seed
    announce(ready, inference, source, seed)
    if source == "interactive":
        converse(ready, inference, console, read_line, seed=seed)
    elif pipe.rank > 0:
        for index, prompt in enumerate(prompt for prompt in prompts for _ in range(inference.num_samples)):
            _answer(ready, inference, prompt, seed=seed, index=index)
    else:
        write_samples(ready, inference, console, [prompt for prompt in prompts for _ in range(inference.num_samples)], seed=seed)


def announce(ready: ReadyModel, inference: InferenceConfig, source: Source, seed: int) -> None:
    sampling = sampling_of(inference)
    log.info("%s, %s.", ready.description, source)
    if inference.sample_input_file is not None and source != "input-file":
        log.warning("sample_input_file %s is not read, because text_gen_type is %s.", inference.sample_input_file, source)
    if not sampling.is_greedy:
        log.info("temperature %g, top_k %d, top_p %g, seed %d.", *sampling, seed)
    elif sampling.top_k or sampling.top_p:
        log.warning("temperature is 0, so the most likely token is always taken: top_k and top_p have no effect. Add -o temperature=1.0 to sample.")


def sampling_of(inference: InferenceConfig) -> Sampling:
    return Sampling(inference.temperature, inference.top_k, inference.top_p)


def write_samples(ready: ReadyModel, inference: InferenceConfig, console: Console, prompts: Sequence[str], *, seed: int) -> None:
    """Writes one sample for each prompt to `sample_output_file` and the screen. Each sample has its own random numbers."""
    for prompt in prompts[:1] if not any(prompts) else ():
        encode_prompt(ready, prompt)  # whether a text can start from nothing, before the old samples are overwritten
    with SampleFile(Path(inference.sample_output_file)) as file, _progress(console, len(prompts)) as progress:
        task = progress.add_task("generating", total=len(prompts))
        for index, prompt in enumerate(prompts):
            sample = _answer(ready, inference, prompt, seed=seed, index=index)
            file.write(sample)
            show(console, sample, number=index + 1, total=len(prompts))
            progress.advance(task)
    log.info("%d sample(s) written to %s.", len(prompts), file.path)


def converse(ready: ReadyModel, inference: InferenceConfig, console: Console, read_line: Callable[[str], str], *, seed: int) -> None:
    """Answers a person's prompts one after the other. The model does not see earlier prompts and answers. Ctrl-C, Ctrl-D and /quit end it."""
    ending = "" if inference.prompt_end in ("\n", "") else f", end it with {inference.prompt_end!r}"
    console.print(f"Write a prompt{ending}; {QUIT}, Ctrl-D or Ctrl-C to end.", markup=False, highlight=False)
    counter = itertools.count()

    def show_piece(piece: str) -> None:
        console.out(printable(piece), end="", highlight=False)

    try:
        for prompt in typed_prompts(read_line, inference.prompt_end):
            sample = _answer(ready, inference, prompt, seed=seed, index=next(counter), on_text=show_piece)
            console.print(f"\n({sample.message})" if sample.message else "", markup=False, highlight=False)
    except KeyboardInterrupt:
        console.print()
    console.print("Bye.")


def _answer(
    ready: ReadyModel, inference: InferenceConfig, prompt: str, *, seed: int, index: int, on_text: Callable[[str], None] | None = None
) -> Continuation:
    return complete(
        ready,
        prompt,
        sampling=sampling_of(inference),
        maximum_tokens=inference.maximum_tokens,
        generator=sample_generator(seed, index),
        on_text=on_text,
    )


def _progress(console: Console, total: int) -> Progress:
    """A bar below the samples, for several of them on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal or total < 2)
