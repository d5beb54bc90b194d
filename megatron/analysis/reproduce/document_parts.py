"""The tables of the document."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron.analysis.reproduce.figures import of_arm
from megatron.analysis.reproduce.protocol import Claim, Protocol, Tier
from megatron.analysis.reproduce.runs import MAIN
from megatron.analysis.reproduce.statistics import Interval, interval_of

Results = Mapping[str, Any]
RULES = """\
Measures:

- The test text decides about the claims. It was not used for anything else. {test:,} tokens of it are read, in windows spread evenly over the text,
  the same ones for every arm and seed.
- The learning rate of each arm comes from the loss on {validation:,} tokens of the validation text, with the seed {seed} that no other run has. If
  the best of the rates is the first or the last, the next one beyond it is tried, too. The rates found on `{domain}` serve for every text.
- The curves read {curve:,} tokens of the validation text.
- Routing is measured on the first {routing:,} tokens of the test text, by the code of `tools/analysis/routing.py`.
- The same seed gives every arm the same batches in the same order. Differences are taken seed by seed, so they are paired.

Verdicts: all texts and seeds together give a mean and Student's t interval ({confidence:.0f} %).

| verdict | rule (the first that holds) |
|---|---|
| shown | the whole interval is above the limit of the claim; for losses {smallest} nats |
| reversed | the whole interval is below the lower limit; for losses -{smallest} nats. This falsifies the claim |
| not shown | the whole interval is below the limit: an effect of the claimed size is excluded |
| within noise | the interval contains the limit: these seeds cannot tell |
"""


POWERS = {"log2_replacement": "times less often", "speedup": "times fewer steps"}
"""Quantities that are logarithms (base 2), and the unit of what they are the logarithm of."""


def number(claim: Claim, one: Interval) -> str:
    """+0.012 [+0.004, +0.020], or as a factor: 2.10 [1.90, 2.33]."""
    if not one.count:
        return "-"
    show: Callable[[float], str] = (lambda value: f"{2**value:.2f}") if claim.quantity in POWERS else (lambda value: f"{value:+.3f}")
    return show(one.mean) if math.isnan(one.low) else f"{show(one.mean)} [{show(one.low)}, {show(one.high)}]"


def unit(claim: Claim) -> str:
    return POWERS.get(claim.quantity, claim.unit)


def limit(claim: Claim, value: float) -> str:
    return f"{2**value:.3g}" if claim.quantity in POWERS else f"{value:g}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def example_of(results: Results) -> str:
    """A run's name, for a command."""
    if not results["runs"]:
        return "TEXT/ARM/RUN"
    run = results["runs"][0]
    return f"{run['domain']}/{run['arm']}/{MAIN}-seed{run['seed']}-lr{run['rate']:g}-{run['steps']}steps"


def missing_runs(results: Results) -> str:
    """The runs that the numbers above do not have."""
    by_arm: dict[tuple[str, str], list[int]] = {}
    for arm, domain, seed in results["missing"]:
        by_arm.setdefault((arm, domain), []).append(seed)
    rows = [f"- {arm} on {domain}: seed {', '.join(map(str, seeds))}" for (arm, domain), seeds in by_arm.items()]
    return "\n".join(["## Runs that are missing\n", "These had not been run when this page was made. The same command runs them.\n", *rows]) + "\n"


def times(results: Results) -> str:
    """How long the runs took, and with which packages."""
    software = ", ".join(f"{name} {version}" for name, version in (results["versions"] or {}).items())
    return f"{time_of(results)}\nSoftware: {software}.\n"


def time_of(results: Results) -> str:
    """How long the runs took."""
    runs = results["runs"]
    seconds = sum(run["seconds"] + run["seconds_measuring"] for run in runs) + results["tuning_seconds"]
    processor = sum(run["cpu_seconds"] for run in runs) + results["tuning_cpu_seconds"]
    tried = sum(len(one["tried"]) for one in results["tuning"].values())
    for_rates = f" and {tried} runs for the learning rates" if tried else ""
    return (
        f"{len(runs)} runs{for_rates} took {processor / 60:.0f} minutes of one core;\n"
        f"one after the other they took {seconds / 60:.0f} minutes on the clock, on a machine that did other work as well."
    )


def protocol_section(protocol: Protocol, tier: Tier) -> str:
    """Text, training, measures and rules."""
    measure, tuning, common = protocol.measure, protocol.tuning, protocol.common
    tokens = tier.steps * common["train_micro_batch_size_per_gpu"] * common["seq_length"]
    texts = "\n".join(f"- `{name}`: {text.text}; a byte-level BPE of {text.vocabulary} tokens" for name, text in protocol.domains.items())
    seeds = ", ".join(map(str, tier.seeds))
    rules = RULES.format(
        test=measure.test_tokens,
        validation=measure.validation_tokens,
        curve=measure.curve_tokens,
        routing=measure.routing_tokens,
        seed=tuning.seed,
        domain=tuning.domain,
        confidence=100 * measure.confidence,
        smallest=measure.smallest_loss,
    )
    batch, length = common["train_micro_batch_size_per_gpu"], common["seq_length"]
    return (
        "## Protocol\n\n"
        "[protocol.yml](reproduction/protocol.yml) has every number. It was committed before the runs.\n\n"
        f"Texts:\n\n{texts}\n\n"
        f"Training: {tier.steps} steps of {batch} sequences of {length} tokens ({tokens:,} tokens), Adam, a warm-up over a tenth of the steps,\n"
        f"then a cosine down to {tuning.final:g} of the largest rate, seeds {seeds}.\n\n{rules}"
    )


def arms_table(protocol: Protocol, tier: Tier) -> str:
    """Every arm with its size."""
    lines = [
        "## Arms\n",
        "Sizes are computed by the code of `tools/analysis/size.py`. FLOPs: of one token in training. A mismatch of sizes stops the command.\n",
        "| arm | what it is | parameters | active | FLOPs | as large as | texts |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arm in protocol.arms.items():
        if arm.group not in tier.groups:
            continue
        size, match = protocol.sizes[name], arm.as_large_as
        same = "" if match is None else f"{match.arm} ({match.count}: {_apart(protocol, name)})"
        texts = ", ".join(tier.groups[arm.group])
        lines.append(f"| `{name}` | {arm.title}: {arm.says} | {size.total:,} | {size.active:,} | {size.flops:,} | {same} | {texts} |")
    return "\n".join(lines) + "\n"


def _apart(protocol: Protocol, name: str) -> str:
    match = protocol.arms[name].as_large_as
    assert match is not None
    own, other = getattr(protocol.sizes[name], match.count), getattr(protocol.sizes[match.arm], match.count)
    return f"{100 * (own / other - 1):+.1f} %"


def claims_table(protocol: Protocol) -> str:
    """Hypotheses, and what falsifies them."""
    lines = ["## Claims\n", "| claim | hypothesis | measure | falsified if |", "|---|---|---|---|"]
    for claim in protocol.claims.values():
        if claim.faster is not None:
            how = f"{claim.quantity} of {claim.faster} over {claim.slower}"
        else:
            how = f"{claim.quantity}: " + " ".join(_term(factor, arm) for arm, factor in claim.sum.items())
        lines.append(f"| {claim.title} | {claim.hypothesis} | {how} | {claim.falsified} |")
    return "\n".join(lines) + "\n"


def _term(factor: float, arm: str) -> str:
    sign, size = "-" if factor < 0 else "+", abs(factor)
    return f"{sign} {'' if size == 1 else f'{size:g} x '}`{arm}`"


def rates_table(results: Results, protocol: Protocol) -> str:
    """The validation loss at each rate that was tried; the chosen one is bold."""
    rates = sorted({rate for one in results["tuning"].values() for rate, _ in one["tried"]})
    if not rates:
        found = ", ".join(f"{arm} {one['rate']:g}" for arm, one in results["tuning"].items() if one["rate"] is not None)
        return f"## Learning rates\n\nFrom the full tier: {found}.\n"
    lines = [
        "## Learning rates\n",
        "Validation loss (nats) of the runs that choose each arm's rate. Bold: the chosen one.\n",
        "| arm | steps | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---|---|" + "---|" * len(rates),
    ]
    for arm, one in results["tuning"].items():
        tried = dict(one["tried"])
        cells = ["" if rate not in tried else f"**{tried[rate]:.3f}**" if rate == one["rate"] else f"{tried[rate]:.3f}" for rate in rates]
        steps = protocol.tiers[results["tier"]].tuning[protocol.arms[arm].group].steps
        lines.append(f"| `{arm}` | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def losses_table(results: Results, protocol: Protocol) -> str:
    """Test losses by arm and text."""
    domains = list(protocol.domains)
    lines = [
        "## Losses\n",
        "Test loss in nats per token: mean over the seeds ± one standard error, and in brackets each seed.\n",
        "| arm | " + " | ".join(domains) + " |",
        "|---|" + "---|" * len(domains),
    ]
    for arm in protocol.arms:
        cells = [_loss_cell(of_arm(results, arm, domain), protocol) for domain in domains]
        if any(cells):
            lines.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _loss_cell(runs: Sequence[Mapping[str, Any]], protocol: Protocol) -> str:
    losses = [run["test_loss"] for run in runs]
    if not losses:
        return ""
    found = interval_of(losses, protocol.measure.confidence)
    error = "" if math.isnan(found.error) else f" ± {found.error:.3f}"
    return f"{found.mean:.3f}{error} ({', '.join(f'{loss:.3f}' for loss in losses)})"


ROUTING = {
    "replacement": "replacement, %",
    "delta_uniform": "delta uniform, %",
    "busiest_over_mean": "busiest / mean",
    "first_repeats": "repeated first choice, %",
    "lore_entropy": "LoRE entropy / even",
    "dead_lores": "dead LoREs a layer",
}


def routing_table(results: Results, protocol: Protocol) -> str:
    """Means over layers and seeds."""
    lines = [
        "## Routing\n",
        "Means over the layers and the seeds.\n",
        "| arm | text | " + " | ".join(ROUTING.values()) + " |",
        "|---|---|" + "---|" * len(ROUTING),
    ]
    for arm in protocol.arms:
        for domain in protocol.domains:
            runs = [run for run in of_arm(results, arm, domain) if "routing" in run]
            if not runs:
                continue
            cells = [f"{np.mean([run['routing'][name] for run in runs]):.2f}" if name in runs[0]["routing"] else "" for name in ROUTING]
            lines.append(f"| `{arm}` | {domain} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
