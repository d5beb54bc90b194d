"""The pictures of the papers, drawn from results.json: curves with bands, differences with error bars, routing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron.analysis.charts.chart import Bars, Chart, Figure, Floats, Lines, Series, View
from megatron.analysis.page import COLOURS
from megatron.analysis.reproduce.claims import quantity
from megatron.analysis.reproduce.protocol import Picture, Protocol
from megatron.analysis.reproduce.results import runs_of
from megatron.analysis.reproduce.statistics import interval_of

Results = Mapping[str, Any]
Run = Mapping[str, Any]
ACTIVE = {1: "active-1", 2: "moe", 4: "active-4", 8: "active-8"}
TOTAL = {4: "total-4", 8: "moe", 16: "total-16"}
FAMILIES = {
    "structmoe-differences": ("StructMoE and its variants", "moe-9", ["structmoe", "router-free", "standalone", "structmoe-balanced"]),
    "cosmoes-differences": ("CoSMoEs' models", "moe", ["dense-flop", "dense-param", "moe-wd"]),
    "bles-differences": ("Block-wise expert selection", "moe", ["moe-bles", "moe-bles-weak", "moe-bles-late", "moe-bles-small"]),
    "beside": ("Fine-grained, shared and latent experts", "moe", ["fine-grained", "shared", "latent"]),
}
"""Name of the picture -> title, the arm that others are compared with, the others."""


def figures_of(protocol: Protocol, results: Results) -> list[Figure]:
    """Every picture that has something to show."""
    makers: list[Callable[[], Figure | None]] = [lambda one=one: curves(one, protocol, results) for one in protocol.figures]  # type: ignore[misc]
    makers += [lambda name=name: differences(name, protocol, results) for name in FAMILIES]  # type: ignore[misc]
    makers += [lambda: numbers_of_experts(protocol, results), lambda: routing(protocol, results)]
    return [figure for maker in makers if (figure := maker()) is not None]


def of_arm(results: Results, arm: str, domain: str) -> list[Run]:
    """An arm's runs on a text, seed by seed."""
    return [run for (name, at, _), run in sorted(runs_of(results).items()) if (name, at) == (arm, domain)]


def domains_with(protocol: Protocol, results: Results, arms: Sequence[str]) -> list[str]:
    """The texts on which each of these arms was trained at least once."""
    return [domain for domain in protocol.domains if all(of_arm(results, arm, domain) for arm in arms)]


def curves(picture: Picture, protocol: Protocol, results: Results) -> Figure | None:
    """Validation loss over tokens; a band of one standard error over the seeds."""
    charts: list[Chart] = []
    for domain in domains_with(protocol, results, picture.arms):
        lines, x = [], []
        for place, arm in enumerate(picture.arms):
            runs = of_arm(results, arm, domain)
            x = [round(step * runs[0]["tokens"] / runs[0]["steps"] / 1000) for step, _ in runs[0]["curve"]]
            points = [interval_of([run["curve"][at][1] for run in runs], protocol.measure.confidence) for at in range(len(x))]
            middle, error = np.array([one.mean for one in points]), np.nan_to_num([one.error for one in points])
            lines.append(Series(protocol.arms[arm].title, middle, COLOURS[place], low=middle - error, high=middle + error))
        # The first points are far above the others and would hide the differences.
        shown = max(1, len(x) // 5)
        ends = [value for line in lines for value in line.y[shown:]]
        charts.append(
            Lines(domain, x, lines, "thousands of tokens", "validation loss (nats)", (min(ends) - 0.02, max(ends) + 0.05) if ends else None)
        )
    caption = "Lines: means over the seeds. Bands: one standard error on each side. The beginning of the training is above the picture."
    return Figure(picture.name, picture.title, [View("", charts)], caption, picture.source) if charts else None


def differences(name: str, protocol: Protocol, results: Results) -> Figure | None:
    """Test loss minus that of one arm, seed by seed, with t intervals: below 0 is better."""
    title, reference, all_arms = FAMILIES[name]
    arms = [arm for arm in all_arms if arm in protocol.arms and domains_with(protocol, results, [reference, arm])]
    series = []
    for place, domain in enumerate(domains_with(protocol, results, [reference])):
        found = [_difference(protocol, results, arm, reference, domain) for arm in arms]
        mean, low, high = (np.array([getattr(one, part) for one in found]) for part in ("mean", "low", "high"))
        series.append(Series(domain, mean, COLOURS[place], low=low, high=high))
    if not arms:
        return None
    label = f"test loss minus that of {protocol.arms[reference].title} (nats)"
    chart = Bars("", [protocol.arms[arm].title for arm in arms], series, "", label)
    bars = f"{100 * protocol.measure.confidence:.0f} % t intervals of the paired differences"
    caption = f"Below 0: better than {protocol.arms[reference].title}. Error bars: {bars}."
    return Figure(name, title, [View("", [chart], 700)], caption)


def _difference(protocol: Protocol, results: Results, arm: str, reference: str, domain: str) -> Any:
    runs, seeds = runs_of(results), protocol.tiers[results["tier"]].seeds
    pairs = [(runs.get((arm, domain, seed)), runs.get((reference, domain, seed))) for seed in seeds]
    return interval_of([one["test_loss"] - other["test_loss"] for one, other in pairs if one and other], protocol.measure.confidence)


def numbers_of_experts(protocol: Protocol, results: Results) -> Figure | None:
    """CoSMoEs' Figure 7: the loss over the experts of a token, and over the experts in all."""
    charts: list[Chart] = []
    for label, arms in (("experts for each token, of 8", ACTIVE), ("experts in all, 2 for each token", TOTAL)):
        domains = domains_with(protocol, results, list(arms.values()))
        lines = []
        for place, domain in enumerate(domains):
            found = [interval_of([run["test_loss"] for run in of_arm(results, arm, domain)], protocol.measure.confidence) for arm in arms.values()]
            middle, error = np.array([one.mean for one in found]), np.nan_to_num([one.error for one in found])
            lines.append(Series(domain, middle, COLOURS[place], low=middle - error, high=middle + error))
        if lines:
            charts.append(Lines("", list(arms), lines, label, "test loss (nats)", logarithmic_x=True))
    if not charts:
        return None
    y = [float(value) for chart in charts for line in chart.series for value in line.y]  # type: ignore[union-attr]
    span = (min(y) - 0.03, max(y) + 0.03)
    charts = [Lines(one.title, one.x, one.series, one.x_label, one.y_label, span, logarithmic_x=True) for one in charts if isinstance(one, Lines)]
    caption = "Means over the seeds; bands of one standard error on each side. Both charts have the same scale."
    return Figure("experts", "Active and total experts", [View("", charts)], caption, "CoSMoEs' Figure 7")


def routing(protocol: Protocol, results: Results) -> Figure | None:
    """CoSMoEs' Table 3 and Mixtral's Table 5."""
    charts: list[Chart] = []
    names = {"replacement": "expert replacement (%)", "delta_uniform": "delta uniform (%)"}
    arms = [
        arm
        for arm in ("moe", "moe-bles", "moe-bles-weak", "moe-bles-late", "moe-bles-small")
        if arm in protocol.arms and domains_with(protocol, results, [arm])
    ]
    for name, label in names.items():
        series = [
            Series(domain, np.array([_mean(name, of_arm(results, arm, domain)) for arm in arms]), COLOURS[place])
            for place, domain in enumerate(domains_with(protocol, results, ["moe"]))
        ]
        if arms and series:
            charts.append(Bars("", [protocol.arms[arm].title for arm in arms], series, "", label))
    lines = []
    for place, domain in enumerate(domains_with(protocol, results, ["moe"])):
        found_XL = np.array([run["routing"]["first_repeats"] for run in of_arm(results, "moe", domain)])
        lines.append(Series(domain, found_XL.mean(0), COLOURS[place], low=found_XL.min(0), high=found_XL.max(0)))
    if lines:
        even = 100 / float(protocol.model_settings("moe")["moe_num_experts"])
        charts.append(Lines("MoE, 2 of 8", [f"layer {at}" for at in range(len(lines[0].y))], lines, "", "repeated first choices (%)", even=even))
    caption = "Top: CoSMoEs' Table 3. Bottom: Mixtral's Table 5; the dashed line is chance, the bands reach from the lowest to the highest seed."
    return Figure("routing", "Expert replacement, balance and repetition", [View("", charts, 700)], caption) if charts else None


def _mean(name: str, runs: Sequence[Run]) -> float:
    values: Floats = np.array([quantity(name, run) for run in runs])
    return float(values.mean()) if values.size else float("nan")
