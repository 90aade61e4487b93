"""The picture of the result: training loss, accuracies, and the sweep of rates."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

COLORS = {
    "plain": "tab:blue", "plain, rank 8": "tab:cyan", "plain, DBP": "navy", "kernel N": "gold",
    "kernel 2N": "tab:orange", "kernel 4N": "tab:red", "kernel 2N, DBP": "saddlebrown",
}  # fmt: skip


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw whatever parts of the result there are."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.6), constrained_layout=True)
    for place, (name, row) in enumerate(result["tuned"].items()):
        _curve(axes[0], name, row)
        accuracy = row["accuracy"]
        axes[1].bar(place, accuracy["mean"], yerr=accuracy["deviation"] or 0, color=COLORS[name], capsize=3, alpha=0.8)
        axes[1].plot([place] * len(accuracy["all"]), accuracy["all"], "ko", markersize=3, fillstyle="none")
    axes[0].set_xlabel("step")
    axes[0].set_ylabel("nats per token")
    axes[0].set_title("training loss, means of 10 steps over all runs, tuned rates", fontsize=10)
    axes[1].set_xticks(range(len(result["tuned"])), list(result["tuned"]), rotation=45, fontsize=8)
    axes[1].set_ylabel("exact answers, held-out strings")
    axes[1].set_title(f"mean, deviation and values of {len(result['plan']['seeds'])} seeds", fontsize=10)
    axes[1].set_ylim(0, 1.05)
    _sweep(axes[2], result)
    for each in axes:
        each.grid(which="both", alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curve(axes: Any, name: str, row: dict[str, Any]) -> None:
    runs = [run["losses"] for own in row["runs"].values() for run in own.values()]
    means = [statistics.fmean(values) for values in zip(*runs, strict=True)]
    starts = range(0, len(means) - len(means) % 10, 10)
    points = [(start + 10, statistics.fmean(means[start : start + 10])) for start in starts]
    if points:
        axes.semilogy(*zip(*points, strict=True), "--" if "DBP" in name else "-", color=COLORS[name],
                      label=f"{name}, {row['parameters']} at {row['rate']:g}")  # fmt: skip
        axes.legend(fontsize=7)


def _sweep(axes: Any, result: dict[str, Any]) -> None:
    for name, row in result["learning_rates"].items():
        if row:
            points = [(float(rate), score["loss"]) for rate, score in row.items()]
            axes.loglog(*zip(*points, strict=True), "--o" if "DBP" in name else "-o", markersize=4, color=COLORS[name],
                        label=name)  # fmt: skip
    axes.set_xlabel("learning rate")
    axes.set_ylabel("nats per token")
    axes.set_title("loss on validation strings", fontsize=10)
    if result["learning_rates"]:
        axes.legend(fontsize=7)
