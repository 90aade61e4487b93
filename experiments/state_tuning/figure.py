"""The picture of the result: accuracies of all, per transform, and the sweep of rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = {"state": "tab:blue", "fullstate": "tab:cyan", "lora": "tab:red", "large-lora": "tab:orange"}
WAYS = {"alone": "alone", "examples": "4 examples", "instruction": "instruction"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw whatever parts of the result there are."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(15, 5), constrained_layout=True, width_ratios=(2, 1))
    _accuracies(axes[0], result)
    _sweep(axes[1], result)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _accuracies(axes: Any, result: dict[str, Any]) -> None:
    bars = []
    for kind, ways in result["untuned"].items():
        bars += [(f"{kind},\n{WAYS[how]}", row, "0.75" if kind == "small" else "0.5") for how, row in ways.items()]
    for name, sizes in result["tuned"].items():
        bars += [(f"{name},\n{count} samples", row, COLORS[name]) for count, row in sizes.items()]
    markers = dict(zip(result["plan"]["transforms"], "osvD^<>P", strict=False))
    for place, (_, row, color) in enumerate(bars):
        accuracy = row["accuracy"]
        axes.bar(place, accuracy["mean"], yerr=accuracy["deviation"] or 0, color=color, capsize=3, alpha=0.8)
        for name, own in row["transforms"].items():
            axes.plot(place, own["mean"], markers[name], color="k", markersize=4, fillstyle="none",
                      label=name if place == 0 else None)  # fmt: skip
    axes.set_xticks(range(len(bars)), [label for label, _, _ in bars], rotation=60, fontsize=8)
    axes.set_ylabel("exact answers, held-out strings")
    axes.set_ylim(0, 1.05)
    axes.set_title(f"mean and deviation over {len(result['plan']['seeds'])} seeds; marks: single transforms")
    axes.grid(axis="y", alpha=0.3)
    if bars:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.005, 0.8))


def _sweep(axes: Any, result: dict[str, Any]) -> None:
    for name, sizes in result["learning_rates"].items():
        for count, row in sizes.items():
            style = "-o" if int(count) == max(result["plan"]["samples"]) else "--o"
            if row:
                points = [(float(rate), score["loss"]) for rate, score in row.items()]
                axes.loglog(*zip(*points, strict=True), style, markersize=4, color=COLORS[name],
                            label=f"{name}, {count}")  # fmt: skip
    axes.set_xlabel("learning rate")
    axes.set_ylabel("nats per token")
    axes.set_title("loss on validation strings")
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
