#!/usr/bin/env python
"""Write the experts of a model into one file with one aligned record for each, for `expert_offload.store`.

python tools/ckpts/pack_experts.py runs/quickstart experts.packed [--granularity lore]
python tools/ckpts/pack_experts.py hf/Mixtral-8x7B experts.json --index

INPUT is a checkpoint of this program or of GPT-NeoX in any layout, or a folder of Hugging Face's (Mixtral, OLMoE, Qwen-MoE, ...). With --index
nothing is copied: the file says where the experts lie in INPUT. Interrupted, the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import exit_status


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write the experts of a model into one file with one aligned record for each.")
    parser.add_argument("input", type=Path, help="a checkpoint (global_step100), the directory of a run, or a folder of Hugging Face's")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--granularity", choices=["expert", "lore"], default="expert", help="what moves: experts, or the LoREs of StructMoE")
    parser.add_argument("--index", action="store_true", help="write where the experts lie in INPUT, and copy nothing")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)

    def work() -> None:
        from megatron.training.process import choose_accelerator

        choose_accelerator()
        from megatron.checkpoint.expert_places import places_in_checkpoint
        from megatron.convert.expert_places import open_their_model
        from megatron.convert.opened import open_checkpoint
        from megatron.inference.offload.packed import outline, write_index, write_packed
        from megatron.inference.offload.units import fingerprint, units_of

        read: Callable[[str], Any]
        if (options.input / "config.json").is_file():
            theirs = open_their_model(options.input)
            config, vocabulary, read, places_in = theirs.config, theirs.source.vocabulary, theirs.read, theirs.places
        else:
            opened = open_checkpoint(options.input)
            config, vocabulary, read = opened.source.config, opened.source.vocabulary, opened.weights.read

            def places_in(wanted: Any) -> Any:
                return places_in_checkpoint(opened.path, wanted)

        units = units_of(config, vocabulary, granularity=options.granularity)
        if options.index:
            path = write_index(options.output, places_in({number: each.wanted for number, each in units.items()}), of=fingerprint(read, units))
        else:
            first = next(iter(units.values()))
            path = write_packed(options.output, outline(units, read(first.prefix + first.names[0]).dtype), read, of=fingerprint(read, units))
        print(f"Wrote {path} ({path.stat().st_size:,} bytes): {sum(each.units for each in units.values()):,} records of {len(units)} layers.")

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
