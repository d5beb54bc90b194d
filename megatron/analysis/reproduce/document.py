"""docs/reproduction.md from the protocol and results.json, and nothing else but a hand-written file of remarks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.analysis.charts.chart import Figure
from megatron.analysis.reproduce import document_parts as parts
from megatron.analysis.reproduce.claims import Outcome, outcome
from megatron.analysis.reproduce.figures import figures_of
from megatron.analysis.reproduce.protocol import Protocol, Tier, whole_text
from megatron.analysis.reproduce.statistics import NOT_RUN, NOT_SHOWN, REVERSED, SHOWN, WITHIN_NOISE

DOCUMENT, FOLDER, RESULTS, REMARKS = "reproduction.md", "reproduction", "results.json", "remarks.md"
LONG, PROTOCOL_NAME = "long.json", "protocol.yml"
ORDER = (SHOWN, NOT_SHOWN, REVERSED, WITHIN_NOISE, NOT_RUN)
INTRODUCTION = """\
<!-- Made by tools/reproduce.py from {folder}/{results}, {folder}/protocol.yml and {folder}/{remarks}. Change those and run `{again}`. -->

# The papers' claims in miniature

This page reruns the claims of the papers with small models on a CPU: {seeds} seeds, matched sizes, tuned learning rates. The models have
{least} to {most} million parameters and read {tokens} tokens. The papers' models are a hundred to several thousand times as large
and read at least 100,000 times as much. A claim that does not show here may hold there, and the other way round. Anyone can rerun what is here.
"""
HOW = """\
## How to rerun it

```bash
make reproduce-quick                              # under 15 minutes on two cores: the core arms, fewer steps, one text, the learning rates below
make reproduce                                    # the tiers full and long: every number on this page
python tools/reproduce.py --list                  # every run and its loss
python tools/reproduce.py --report                # this page again, from the runs that exist
python tools/reproduce.py --again {example}
```

The last command trains one run once more and compares every number. Ctrl-C stops; the same command goes on. A run that has been finished is not run
again, unless its settings have changed. `runs/reproduce/TIER/TEXT/ARM/RUN/config.yml` is the whole configuration of a run:
`python deepy.py train.py` trains it, too.
"""


def write_document(results: Mapping[str, Any], protocol: Protocol, file: Path, out: Path) -> Path:
    """Writes `out/reproduction.md`, the results in `out/reproduction` and the pictures, with a copy of the protocol's `file` beside them.

    The page has the results of both tiers that lie there: results.json, and long.json of the tier `long`. Returns its path. Raises OSError.
    """
    from megatron.analysis.charts.picture import write_picture

    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / (LONG if results["tier"] == "long" else RESULTS)).write_text(as_json(results), encoding="utf-8")
    if not (folder / file.name).exists() or not file.samefile(folder / file.name):
        (folder / PROTOCOL_NAME).write_text(whole_text(file), encoding="utf-8")
    main, longer = stored(folder / RESULTS) or results, stored(folder / LONG)
    for figure in [*figures_of(protocol, main), *long_figures(protocol, longer)]:
        write_picture(figure, folder / f"{figure.name}.png")
    remarks = folder / REMARKS
    text = document(main, protocol, remarks.read_text(encoding="utf-8") if remarks.is_file() else "", longer)
    (out / DOCUMENT).write_text(text, encoding="utf-8")
    return out / DOCUMENT


def stored(path: Path) -> dict[str, Any] | None:
    """Results from a file. None: there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def long_figures(protocol: Protocol, longer: Mapping[str, Any] | None) -> list[Figure]:
    """The pictures of the long tier, with names of their own."""
    return [] if longer is None else [replace(figure, name=f"long-{figure.name}") for figure in figures_of(protocol, longer)]


def as_json(results: Mapping[str, Any]) -> str:
    """One line for each run, so that a diff shows which run changed."""
    runs = ",\n".join(f"  {json.dumps(run)}" for run in results["runs"])
    tuning = ",\n".join(f"  {json.dumps(arm)}: {json.dumps(one)}" for arm, one in results["tuning"].items())
    rest = {key: value for key, value in results.items() if key not in ("runs", "tuning")}
    head = json.dumps(rest, indent=1).removesuffix("\n}")
    return f'{head},\n "tuning": {{\n{tuning}\n }},\n "runs": [\n{runs}\n ]\n}}\n'


def document(results: Mapping[str, Any], protocol: Protocol, remarks: str = "", longer: Mapping[str, Any] | None = None) -> str:
    """The page. `remarks`: the hand-written part; empty: there is none. `longer`: the results of the long tier; None: it has not been run."""
    tier = protocol.tiers[results["tier"]]
    outcomes = [outcome(name, protocol, results) for name in protocol.claims]
    sections = [
        introduction(results, protocol, tier),
        verdicts(outcomes, protocol),
        *([long_section(longer, results, protocol)] if longer is not None else []),
        *([f"## What the results say\n\n{remarks.strip()}\n"] if remarks.strip() else []),
        *([parts.missing_runs(results)] if results["missing"] else []),
        HOW.format(example=parts.example_of(results)),
        parts.times(results),
        parts.protocol_section(protocol, tier),
        parts.arms_table(protocol, tier),
        parts.claims_table(protocol),
        parts.rates_table(results, protocol),
        parts.losses_table(results, protocol),
        parts.routing_table(results, protocol),
        pictures(figures_of(protocol, results)),
    ]
    return "\n".join(sections)


def introduction(results: Mapping[str, Any], protocol: Protocol, tier: Tier) -> str:
    arms = [protocol.sizes[arm].total for arm in protocol.arms if protocol.arms[arm].group in tier.groups]
    tokens = max((run["tokens"] for run in results["runs"]), default=0)
    return INTRODUCTION.format(
        folder=FOLDER,
        results=RESULTS,
        remarks=REMARKS,
        seeds=len(tier.seeds),
        least=f"{min(arms) / 1e6:.2f}",
        most=f"{max(arms) / 1e6:.2f}",
        tokens=f"{tokens:,}",
        again=f"python tools/reproduce.py --tier {results['tier']} --report",
    )


def verdicts(outcomes: Sequence[Outcome], protocol: Protocol) -> str:
    """One row for each claim whose arms the tier has. A positive number speaks for the paper."""
    asked = [one for one in outcomes if one.wanted]
    counts = Counter(one.verdict for one in asked)
    total = ", ".join(f"{counts[name]} {name}" for name in ORDER if counts[name])
    lines = [
        "## Verdicts\n",
        f"{len(asked)} claims: {total}.\n",
        "A number above 0 (a factor above 1) speaks for the claim. "
        f"In brackets: the {parts.percent(protocol.measure.confidence)} interval over texts and seeds.",
        'Limit: what the whole interval must be above for "shown".\n',
        "| claim | source | number | limit | unit | pairs | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in asked:
        claim = protocol.claims[one.name]
        limit = protocol.measure.smallest_loss if claim.shown_above is None else claim.shown_above
        pairs = f"{one.whole.count} of {one.wanted}" if one.whole.count < one.wanted else f"{one.wanted}"
        number, unit = parts.number(claim, one.whole), parts.unit(claim)
        lines.append(f"| {claim.title} | {claim.source} | {number} | {parts.limit(claim, limit)} | {unit} | {pairs} | **{one.verdict}** |")
    if both := [one for one in asked if len(one.by_domain_verdict) > 1]:
        lines += ["", "Each text alone:\n", "| claim | " + " | ".join(protocol.domains) + " |", "|---|" + "---|" * len(protocol.domains)]
        lines += [_by_text(one, protocol) for one in both]
    if left_out := [protocol.claims[one.name].title for one in outcomes if not one.wanted]:
        lines += ["", f"This tier does not have the arms of these claims: {'; '.join(left_out)}."]
    return "\n".join(lines) + "\n"


def _by_text(one: Outcome, protocol: Protocol) -> str:
    claim = protocol.claims[one.name]
    cells = [f"{parts.number(claim, one.by_domain[domain])}: {one.by_domain_verdict[domain]}" for domain in one.by_domain_verdict]
    note = " (**the texts differ**)" if one.texts_differ else ""
    return f"| {claim.title}{note} | " + " | ".join(cells) + " |"


def long_section(longer: Mapping[str, Any], results: Mapping[str, Any], protocol: Protocol) -> str:
    """Verdicts, losses and pictures of the long tier."""
    tier, short = protocol.tiers[longer["tier"]], protocol.tiers[results["tier"]]
    outcomes = [outcome(name, protocol, longer) for name in protocol.claims]
    table = verdicts(outcomes, protocol).removeprefix("## Verdicts\n\n").split("\n\nThis tier does not")[0].rstrip("\n")
    texts = ", ".join(f"`{domain}`" for domain in dict.fromkeys(domain for domains in tier.groups.values() for domain in domains))
    losses = parts.losses_table(longer, protocol).removeprefix("## Losses\n\n")
    rates = parts.rates_table(longer, protocol).removeprefix("## Learning rates\n\n")
    begin = (
        f"## {tier.steps / short.steps:g} times as long\n\n"
        f"The same arms and seeds with {tier.steps:,} steps in place of {short.steps:,}, on {texts} (`--tier {longer['tier']}`).\n"
        f"Do the verdicts come from a short training? {parts.time_of(longer)}\n"
    )
    missing = [parts.missing_runs(longer).replace("## Runs that are missing\n\n", "")] if longer["missing"] else []
    shown = pictures([figure for figure in long_figures(protocol, longer) if "differences" in figure.name]).removeprefix("## Pictures\n\n")
    curves = ", ".join(f"[{figure.title}]({FOLDER}/{figure.name}.png)" for figure in long_figures(protocol, longer))
    return "\n".join([begin, table, "", *missing, losses, rates, shown, f"All pictures of this tier: {curves}.\n"])


def pictures(figures: Sequence[Figure]) -> str:
    lines = ["## Pictures\n"]
    for figure in figures:
        source = f" After {figure.source}." if figure.source else ""
        lines += [f"![{figure.title}]({FOLDER}/{figure.name}.png)\n", f"{figure.title}.{source} {figure.caption}\n"]
    return "\n".join(lines).rstrip("\n") + "\n"
