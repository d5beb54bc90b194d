#!/usr/bin/env python
"""How much loss block-wise expert selection costs, and how many expert replacements it saves: one small model, trained with several settings.

python prepare_data.py sotu --vocab-size 2048 --name sotu2k
python tools/bench/selection_frontier.py runs/frontier                               every run of selection_frontier.jsonl again
python tools/bench/selection_frontier.py runs/frontier --only baseline               this run alone
python tools/bench/selection_frontier.py runs/frontier --new mine moe_losses.block_wise_selection=0.5
python tools/bench/selection_frontier.py --plot docs/images/selection_frontier.png   draws selection_frontier.jsonl

A line of the file is a run: its settings, its loss on held-out text, and what its routers did there. Some runs go on from a checkpoint of an earlier
line; FOLDER in a setting is the folder of the runs. A run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure

from megatron.config.loader import load_config
from megatron.data.loader import TextDataset, batches
from megatron.monitor.jsonl import TRAIN_LOSS, read_jsonl
from megatron.monitor.routing import router_values
from megatron.training.process import choose_accelerator
from megatron.training.run import train
from megatron.training.step import forward, tally_of
from megatron.training.trainer import Trainer

BASE, RESULTS = Path("configs/cosmoes/local_experts_baseline.yml"), Path(__file__).with_name("selection_frontier.jsonl")
ROUTERS = ("expert_replacement", "delta_uniform", "load_imbalance", "dead_experts")


def known_runs() -> list[dict[str, Any]]:
    """The lines of `selection_frontier.jsonl`."""
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def held_out(trainer: Trainer, dataset: TextDataset, micro_batches: int) -> dict[str, Any]:
    """Loss and routers of the model in evaluation mode."""
    engine, tally, moe, layers = trainer.engine, tally_of(trainer.engine), trainer.config.moe, trainer.config.model.num_layers
    stream = batches(dataset, micro_batch=trainer.plan.batch.micro)
    engine.eval()
    with torch.no_grad():
        for _ in range(min(micro_batches, len(dataset) // trainer.plan.batch.micro)):
            tally.add(forward(engine, next(stream), masked_token=None))
    loss, report = tally.totals()
    values = router_values(report, moe, layers)
    return {"loss": loss} | {name: values[f"moe/{name}"] for name in ROUTERS} | {"by_layer": values["moe/expert_replacement_by_layer"]}


def measure(name: str, settings: list[str], folder: Path, micro_batches: int) -> dict[str, Any]:
    """Trains one run and measures it on the validation and the test text."""
    save = folder / name
    trainer = train(load_config([BASE], [*(setting.replace("FOLDER", str(folder)) for setting in settings), f"save={save}"]))
    parts = [held_out(trainer, dataset, micro_batches) for dataset in (trainer.datasets.valid, trainer.datasets.test) if dataset is not None]
    losses = [record[TRAIN_LOSS] for record in read_jsonl(save / "metrics.jsonl") if TRAIN_LOSS in record]
    means = {key: round(mean(part[key] for part in parts), 4) for key in ("loss", *ROUTERS)}
    by_layer = [round(mean(shares), 1) for shares in zip(*(part["by_layer"] for part in parts), strict=True)]
    return {"run": name, "settings": settings, "steps": len(losses), "train_loss": round(mean(losses[-50:]), 4), **means, "by_layer": by_layer}


def plot(runs: list[dict[str, Any]], picture: Path) -> None:
    """Expert replacement and held-out loss of each run against the model without its loss for locality (`against`)."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    axis.fill_between([0, 25], 0, 2, color="#e5f5e0", label="a quarter of the replacements, loss + 2 %")
    for run in (run for run in runs if "against" in run):
        base = next(other for other in runs if other["run"] == run["against"])
        x, y = 100 * run["expert_replacement"] / base["expert_replacement"], 100 * (run["loss"] / base["loss"] - 1)
        axis.plot(x, y, "o", color="#d94801" if base["run"] == "mixtral" else "#08519c")
        axis.annotate(run["run"], (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axis.set(xlabel="expert replacement, % of the model without the loss", ylabel="loss on held-out text, % more", xlim=(0, 110), ylim=(-0.5, None))
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where runs and their measurements go")
    parser.add_argument("--only", nargs="+", default=[], help="names of runs")
    parser.add_argument("--new", nargs="+", default=[], help="a name and settings")
    parser.add_argument("--micro-batches", type=int, default=60, help="of each held-out text")
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    known = known_runs()
    if given.plot is not None:
        plot(known, given.plot)
    if given.folder is None:
        return
    choose_accelerator()
    wanted = [(given.new[0], given.new[1:])] if given.new else [(run["run"], run["settings"]) for run in known]
    for name, settings in wanted:
        if not given.only or name in given.only:
            line = json.dumps(measure(name, settings, given.folder, given.micro_batches))
            with (given.folder / "frontier.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
