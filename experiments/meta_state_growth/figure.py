"""The picture of the result: training loss against compute, and bits per byte."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

COLORS = {
    "small": "tab:gray", "rwkv7": "tab:brown", "large": "tab:blue", "large, half": "tab:cyan", "grown": "tab:red",
}  # fmt: skip
BUCKETS = 40


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw whatever runs there are."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    for place, (name, row) in enumerate(result["summary"].items()):
        points = _curve([run["losses"] for run in result["runs"] if run["name"] == name])
        left.plot(*zip(*points, strict=True), color=COLORS[name], label=f"{name}, {row['parameters']:,} parameters")
        values = row["bits_per_byte"]
        right.errorbar(place, values["mean"], yerr=values["deviation"] or 0, color=COLORS[name], capsize=4, fmt="o")
        right.plot([place] * len(values["all"]), values["all"], "k_", markersize=10)
    left.set_xlabel("part of the compute of a run")
    left.set_ylabel("nats per token")
    left.set_title("training loss, mean over seeds", fontsize=10)
    if result["summary"]:
        left.legend(fontsize=8)
    right.set_xticks(range(len(result["summary"])), list(result["summary"]), fontsize=8)
    right.set_ylabel("bits per byte")
    right.set_title("held-out speeches: mean, deviation and values of all seeds", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curve(runs: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Means of all losses that lie in each of `BUCKETS` equal parts of the compute."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for done, loss in run:
            found.setdefault(int(done * BUCKETS), []).append(loss)
    return [((bucket + 0.5) / BUCKETS, statistics.fmean(found[bucket])) for bucket in sorted(found)]
