#!/usr/bin/env python
"""Which experts the tokens of a text go to: a report of a checkpoint, of a Hugging Face directory, or of routing traces.

python tools/analysis/routing.py CHECKPOINT_OR_HF_DIR [MORE ...] [--text DOMAIN=FILE ...] [--out FOLDER]

CHECKPOINT: a run's directory or one global_step of it. Several paths are shown side by side; checkpoints of one run also get router saturation. A
trace takes the place of a model: a folder of `routing_trace_steps`, a file of `expert_offload.record`, routed experts of vLLM (.npy or .json), or
Megatron-Core's router_trace (.jsonl). docs/routing.md says how to read each figure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.script import at_least_one, exit_status


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Which experts the tokens of a text go to.")
    parser.add_argument("paths", type=Path, nargs="+", metavar="CHECKPOINT_OR_HF_DIR", help="models, or traces")
    text = "a domain and its file or folder (any format that prepare_data.py reads), or sotu, stdlib, math; default: these three"
    parser.add_argument("--text", nargs="+", action="extend", default=[], metavar="DOMAIN=FILE", help=text)
    parser.add_argument("--tokens", type=at_least_one, default=20_000, help="of each domain, at most (default: %(default)s)")
    parser.add_argument("--context", type=at_least_one, help="tokens that are read together; default: what the model takes, at most 1024")
    parser.add_argument("--windows", type=at_least_one, nargs="+", default=[4, 16, 64], help="tokens of a window for SRP and SCH")
    parser.add_argument("--slots", type=at_least_one, nargs="+", help="slots for SCH; default: 1, 2 and 4 times the experts of a token")
    parser.add_argument(
        "--processes", type=at_least_one, nargs="+", help="sizes of expert parallelism; default: powers of two that divide the experts"
    )
    parser.add_argument("--num-experts", type=at_least_one, help="of a layer, where a trace does not say it")
    parser.add_argument("--out", type=Path, help="folder of the report; default: routing_report in the first model's folder")
    parser.add_argument("--trace", type=Path, help="file (.npz) that gets the whole routing of the model")
    parser.add_argument("--json-only", action="store_true", help="write routing.json and no report")
    parser.add_argument("--trust-remote-code", action="store_true", help="Python code that lies beside a model may run")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    options = parse(argv)

    def work() -> None:
        from rich.console import Console

        from megatron.analysis.routing.analyse import Request, analyse
        from megatron.analysis.routing.files import write_findings
        from megatron.analysis.routing.progress import Progress
        from megatron.analysis.routing.report import write_report
        from megatron.analysis.routing.summary import summary_tables
        from megatron.analysis.routing.tally import Measures
        from megatron.analysis.routing.texts import domains_of

        console = Console(stderr=True)
        measures = Measures(options.windows, options.slots, options.processes)
        settings = {"tokens": options.tokens, "context": options.context, "num_experts": options.num_experts, "trace": options.trace}
        request = Request(options.paths, domains_of(options.text), measures=measures, trusted=options.trust_remote_code, **settings)
        found = analyse(request, Progress(console))
        first = options.paths[0]
        folder = options.out or (first if first.is_dir() else first.parent) / "routing_report"
        folder.mkdir(parents=True, exist_ok=True)
        write_findings(found, folder / "routing.json")
        for table in summary_tables(found):
            Console(width=None if sys.stdout.isatty() else 160).print(table)
        console.print(f"Numbers: {folder / 'routing.json'}", soft_wrap=True, highlight=False)
        if not options.json_only:
            with console.status("Drawing the report"):
                page = write_report(found, folder)
            console.print(f"Report: {page}", soft_wrap=True, highlight=False)

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
