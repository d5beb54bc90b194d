"""The work of generate.py: it loads a model and continues prompts from a file or a person, or generates text without prompts."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron.config.inference import InferenceConfig
from megatron.config.neox import NeoXConfig
from megatron.inference.continuation import Continuation, Manner, Prompt, complete, encode_prompt
from megatron.inference.engine import Engine
from megatron.inference.errors import InferenceError
from megatron.inference.model import ReadyModel, load_ready_model
from megatron.inference.prompts import QUIT, Source, choose_source, read_prompts, typed_prompts
from megatron.inference.runner import build_runner
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
    engine = Engine(ready, build_runner(ready), maximum_requests=1 if source == "interactive" else inference.sample_batch_size)
    if source == "interactive":
        converse(engine, inference, console, read_line, seed=seed)
    else:
        _continue(engine, inference, console, prompts, seed=seed)
    if ready.offloaded is not None:
        ready.offloaded.finish(console)


def _continue(engine: Engine, inference: InferenceConfig, console: Console, prompts: Sequence[str], *, seed: int) -> None:
    """Continues all prompts; the first stage of a pipeline writes the samples."""
    ready, pipe = engine.ready, current_groups().pipe
    wanted = [prompt for prompt in encode_prompts(ready, prompts) for _ in range(inference.num_samples)]
    samples = complete(engine, (Prompt(*prompt, index) for index, prompt in enumerate(wanted)), manner_of(inference, seed))
    if pipe.rank > 0:
        deque(samples, maxlen=0)
    else:
        write_samples(samples, Path(inference.sample_output_file), console, total=len(wanted))


def encode_prompts(ready: ReadyModel, prompts: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Each prompt with its tokens. All are known before the old samples are overwritten. Raises InferenceError."""
    tokens = {prompt: encode_prompt(ready, prompt) for prompt in dict.fromkeys(prompts)}
    return [(prompt, tokens[prompt]) for prompt in prompts]


def announce(ready: ReadyModel, inference: InferenceConfig, source: Source, seed: int) -> None:
    sampling = sampling_of(inference)
    log.info("%s, %s.", ready.description, source)
    if inference.sample_input_file is not None and source != "input-file":
        log.warning("sample_input_file %s is not read, because text_gen_type is %s.", inference.sample_input_file, source)
    if not sampling.is_greedy:
        log.info("%s, seed %d.", ", ".join(f"{name} {value:g}" for name, value in sampling._asdict().items()), seed)
    elif ignored := [name for name in ("top_k", "top_p", "min_p") if getattr(sampling, name)]:
        what = f"{' and '.join(ignored)} {'have' if len(ignored) > 1 else 'has'} no effect"
        log.warning("temperature is 0, so the most likely token is always taken: %s. Add -o temperature=1.0 to sample.", what)


def sampling_of(inference: InferenceConfig) -> Sampling:
    return Sampling(inference.temperature, inference.top_k, inference.top_p, inference.min_p, inference.repetition_penalty)


def manner_of(inference: InferenceConfig, seed: int) -> Manner:
    return Manner(sampling_of(inference), inference.maximum_tokens, seed, tuple(inference.stop_strings))


def write_samples(samples: Iterable[Continuation], path: Path, console: Console, *, total: int) -> None:
    """Writes the samples to a file and the screen, each as soon as it is there."""
    with SampleFile(path) as file, _progress(console, total) as progress:
        task = progress.add_task("generating", total=total)
        for number, sample in enumerate(samples, start=1):
            file.write(sample)
            show(console, sample, number=number, total=total)
            progress.advance(task)
    log.info("%d sample(s) written to %s.", total, path)


def converse(engine: Engine, inference: InferenceConfig, console: Console, read_line: Callable[[str], str], *, seed: int) -> None:
    """Answers a person's prompts one after the other. The model does not see earlier prompts and answers. Ctrl-C, Ctrl-D and /quit end it."""
    ending = "" if inference.prompt_end in ("\n", "") else f", end it with {inference.prompt_end!r}"
    console.print(f"Write a prompt{ending}; {QUIT}, Ctrl-D or Ctrl-C to end.", markup=False, highlight=False)

    def show_piece(piece: str) -> None:
        console.out(printable(piece), end="", highlight=False)

    try:
        for index, typed in enumerate(typed_prompts(read_line, inference.prompt_end)):
            prompt = Prompt(typed, encode_prompt(engine.ready, typed), index)
            for sample in complete(engine, [prompt], manner_of(inference, seed), on_text=show_piece):
                console.print(f"\n({sample.message})" if sample.message else "", markup=False, highlight=False)
    except KeyboardInterrupt:
        console.print()
    console.print("Bye.")


def _progress(console: Console, total: int) -> Progress:
    """A bar below the samples, for several of them on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal or total < 2)
