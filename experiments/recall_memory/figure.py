"""The picture of the recall-memory curve: a line for every family, every seed a point."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wkv.files import replacing

# Family -> colour; a contender belongs to the one that its label begins with, the first that fits.
FAMILIES = {
    "rwkv4": "#c05a1c", "rwkv5": "#a8862b", "rwkv6": "#0b6e4f", "rwkv7": "#3d5a9e", "based f=8 + window 8": "#8c2f39",
    "based": "#6f4a8e", "window": "#555555", "attention": "#000000", "transformer": "#4a8fa0",
}  # fmt: skip


def draw(found: dict[str, Any], path: Path) -> None:
    """Accuracy against bytes of state, from the result of a comparison."""
    families: dict[str, list[tuple[int, list[float]]]] = {}
    for entry in found["cases"][0]["entries"]:
        family = next(name for name in FAMILIES if entry["contender"].startswith(name))
        families.setdefault(family, []).append((entry["state_bytes"], entry["accuracy"]["values"]))
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for family, points in families.items():
        points.sort()
        sizes = [size for size, _ in points]
        means = [statistics.fmean(scores) for _, scores in points]
        axes.plot(sizes, means, "o-", color=FAMILIES[family], label=family, linewidth=1.6, markersize=6)
        for size, scores in points:
            axes.plot([size] * len(scores), scores, ".", color=FAMILIES[family], alpha=0.6)
    axes.axhline(found["chance"], color="0.6", linestyle="--", linewidth=1, label="blind guess")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g} KiB")
    axes.set_xlabel("state of one sequence")
    axes.set_ylabel("share of questions answered right")
    axes.set_title("8 pairs, 64 positions; large points: means of three seeds, small ones: seeds", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    with replacing([path]) as [temporary]:
        figure.savefig(temporary, dpi=120, format="png")
