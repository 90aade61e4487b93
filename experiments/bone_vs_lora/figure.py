"""The picture of the result: learning curves at the common and at each method's own rate, and the sweep of rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LABELS = {
    "lora": "LoRA", "pissa": "PiSSA", "olora": "OLoRA", "miss": "MiSS", "bone-row": "bone-row",
    "bone-col": "bone-col", "full": "all parameters",
}  # fmt: skip
COLORS = dict(zip(LABELS, ("tab:red", "tab:orange", "gold", "tab:green", "tab:blue", "tab:cyan", "0.5"), strict=True))


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw whatever parts of the result there are."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.6), constrained_layout=True)
    rate = result["plan"]["common"]
    for place, (kind, title) in enumerate((("common", f"all at {rate:g}"), ("tuned", "each at its best rate"))):
        _curves(axes[place], result, kind)
        axes[place].set_title(f"{title}: held-out Python, mean of {len(result['plan']['seeds'])} seeds", fontsize=10)
    axes[1].sharey(axes[0])
    _sweep(axes[2], result)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(axes: Any, result: dict[str, Any], kind: str) -> None:
    """Bars: standard deviation over seeds; moved sideways a little so that they can be told apart."""
    names = list(result[kind])
    for place, name in enumerate(names):
        rows = result[kind][name]["test"]
        shift = 0.5 * (place - (len(names) - 1) / 2)
        steps = [0.0] + [int(step) + shift for step in rows]
        means = [result["base"]] + [row["mean"] for row in rows.values()]
        bars = [0.0] + [row["deviation"] or 0.0 for row in rows.values()]
        axes.errorbar(steps, means, bars, fmt="--" if name == "full" else "-", marker="o", markersize=3, capsize=2,
                      color=COLORS[name], label=f"{LABELS[name]}, {result[kind][name]['rate']:g}")  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)


def _sweep(axes: Any, result: dict[str, Any]) -> None:
    for name, row in result["learning_rates"].items():
        points = [(float(rate), score) for rate, score in row.items() if score is not None]
        if points:
            axes.semilogx(*zip(*points, strict=True), "--o" if name == "full" else "-o", markersize=4,
                          color=COLORS[name], label=LABELS[name])  # fmt: skip
    axes.set_xlabel("learning rate")
    axes.set_ylabel("bits per byte")
    axes.set_title(f"validation text after step {result['plan']['steps']}", fontsize=10)
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
