#!/usr/bin/env python
"""Turn conversations into token files, with the chat template of a Hugging Face tokenizer and labels for the text that the model writes:

python tools/datasets/preprocess_data_with_chat_template.py --input chats.jsonl --tokenizer-path my-chat-model --output-prefix data/chats

A record is {"conversation": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}. The command writes
data/chats_conversation_document and data/chats_conversation_label_document (-100 for tokens that are not learned). With --reward-key it also writes
data/chats_conversation_reward_document (int32; float32 if a reward is not a whole number). The arguments are GPT-NeoX's, and --on-error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status


def get_args(input_args: list[str] | None = None) -> argparse.Namespace:
    from megatron.data.preprocessing.preprocess_options import add_input_options, add_output_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_options(parser, "conversation")
    labels = parser.add_argument_group("labels")
    kinds = labels.add_mutually_exclusive_group()
    kinds.add_argument("--no-mask", action="store_true", help="learn every token: no labels are written")
    kinds.add_argument("--for-rm", action="store_true", help="label only the end-of-sequence token at the end, for a reward model")
    labels.add_argument("--generation-role", default="assistant", metavar="ROLE", help="the role whose turns are learned (default: %(default)s)")
    labels.add_argument("--only-last", action="store_true", help="learn the last turn only")
    labels.add_argument("--reward-key", metavar="KEY", help="the key of a record that holds its reward")
    labels.add_argument("--binary-reward", action="store_true", help="rewards are true or false (written as 1 and -1)")
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--tokenizer-path", required=True, metavar="HF", help="a tokenizer with a chat template: its folder, or its name on the Hugging Face hub"
    )
    tokenizer.add_argument("--trust-remote-code", action="store_true", help="allow Python code in the tokenizer's folder to run, if there is some")
    tokenizer.add_argument("--ftfy", action="store_true", help="first repair the text with the package ftfy")
    add_output_options(parser)
    arguments = parser.parse_args(input_args)
    if arguments.binary_reward and arguments.reward_key is None:
        parser.error("--binary-reward needs --reward-key, the key of a record that holds its reward")
    return arguments


def main(input_args: list[str] | None = None) -> None:
    """Runs the command. Raises DatasetError, TokenizerError or WorkerError."""
    values = vars(get_args(input_args))
    from megatron.data.preprocessing.chat import ChatTask, chat_job
    from megatron.data.preprocessing.preprocess import preprocess
    from megatron.data.preprocessing.preprocess_options import common_options
    from megatron.data.progress import build_reporter

    options = common_options(values)
    given = {name: values[name] for name in ("tokenizer_path", "generation_role", "only_last", "for_rm", "ftfy", "trust_remote_code")}
    task = ChatTask(**given, mask=not values["no_mask"], rewards=values["reward_key"] is not None)
    job = chat_job(task, options.keys, values["reward_key"], binary_reward=values["binary_reward"])
    print("\n".join(preprocess(job, options, build_reporter()).lines()))


if __name__ == "__main__":
    sys.exit(exit_status(main))
