"""The picture of training.py: tokens per second against length, ours and Llama, one panel for each size of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wkv.files import replacing

COLORS = {"wkv": "#0b6e4f", "llama": "#c05a1c"}
NAMES = {"wkv": "RWKV-7 (wkv)", "llama": "Llama (transformers)"}
LINES = {"fp32": "-", "bf16": "--"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG.

    Args:
        result: of `training.py peers`, with Llama among the peers.
        path: where to.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"].values() if "llama" in row["contenders"]]
    if not rows:
        raise SystemExit("no comparison with Llama in this result; run: training.py peers --peer llama")
    threads = max(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == threads]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure = Figure(figsize=(0.6 + 4.8 * len(sizes), 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        panel(axes, size, [row for row in rows if row["size"] == size])
    plural = "s" * (threads != 1)
    figure.suptitle(f"Training with {threads} thread{plural}: equal parameters and tokens per step", fontsize=10)
    with replacing([path]) as [temporary]:
        figure.savefig(temporary, dpi=150, format="png")


def panel(axes: Any, size: str, rows: list[dict[str, Any]]) -> None:
    """One size of model; bars are the slowest and fastest turn."""
    for precision, line in LINES.items():
        found = sorted((row for row in rows if row["precision"] == precision), key=lambda row: row["length"])
        for who in COLORS if found else ():
            speeds = [row["contenders"][who]["tokens_per_second"] for row in found]
            middle = [x["median"] for x in speeds]
            reach = [[x["median"] - x["min"] for x in speeds], [x["max"] - x["median"] for x in speeds]]
            style = {"color": COLORS[who], "linestyle": line, "marker": "o", "markersize": 4, "capsize": 2}
            lengths = [row["length"] for row in found]
            axes.errorbar(lengths, middle, reach, label=f"{NAMES[who]}, {precision}", linewidth=1.5, **style)
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.1)
    axes.set_ylim(bottom=0)
    axes.set_title(size, fontsize=10)
    axes.set_xlabel("tokens per sequence")
    axes.set_ylabel("tokens per second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7.5, frameon=False, handlelength=3.5)
