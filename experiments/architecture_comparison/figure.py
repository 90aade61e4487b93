"""The picture of the result: quality, speed, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from contenders import LABELS, NAMES

COLORS = dict(zip(NAMES, ("tab:cyan", "tab:green", "tab:olive", "tab:blue", "tab:red"), strict=True))


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw whatever parts of the result there are."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(18, 4.4), constrained_layout=True)
    if result["summary"]:
        _quality(axes[0], result["summary"])
    if result["speed"]:
        _speed(axes[1], result["speed"])
    if result["training_memory"]:
        _training_memory(axes[2], result["training_memory"])
    if result["generation_memory"]:
        _generation_memory(axes[3], result["generation_memory"]["bytes"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _quality(axes: Any, summary: dict[str, Any]) -> None:
    """Dots: seeds; lines: means."""
    names = [name for name in NAMES if name in summary]
    for place, name in enumerate(names):
        for kind, shift, marker in (("windows", -0.12, "o"), ("carried", 0.12, "^")):
            found = summary[name][kind]
            if found is None:
                continue
            axes.plot([place + shift] * len(found["all"]), found["all"], marker, color=COLORS[name], alpha=0.6)
            axes.hlines(found["mean"], place + shift - 0.1, place + shift + 0.1, color="0.2")
        own = summary[name]["windows"]
        if own is not None:
            axes.annotate(f"{own['mean']:.3f}", (place, max(own["all"])), xytext=(0, 7), fontsize=8,
                          textcoords="offset points", ha="center")  # fmt: skip
    axes.set_xticks(range(len(names)), [LABELS[name] for name in names])
    axes.margins(x=0.1, y=0.15)
    axes.set_ylabel("bits per byte")
    axes.set_title("held-out text\n(circle: windows of 256; triangle: state carried)", fontsize=10)
    axes.grid(axis="y", alpha=0.3)


def _speed(axes: Any, speed: dict[str, Any]) -> None:
    width = 0.8 / len(speed)
    for number, (length, rows) in enumerate(speed.items()):
        for place, name in enumerate(NAMES):
            row, x = rows[name], place + (number - (len(speed) - 1) / 2) * width
            axes.bar(x, row["median"], width, color=COLORS[name], alpha=1 - 0.45 * number)
            whisker = [[row["median"] - row["lowest"]], [row["highest"] - row["median"]]]
            axes.errorbar(x, row["median"], whisker, fmt="none", ecolor="0.3", capsize=2, linewidth=0.8)
            axes.annotate(length, (x, 0), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(range(len(NAMES)), [LABELS[name] for name in NAMES])
    axes.set_ylabel("tokens per second")
    axes.set_title("training step, one thread\n(number in the bar: T)", fontsize=10)
    axes.grid(axis="y", alpha=0.3)


def _training_memory(axes: Any, memory: dict[str, Any]) -> None:
    for name in NAMES:
        points = memory[name]
        axes.loglog([int(x) for x in points], [row["added"] / 1e6 for row in points.values()], "o-",
                    color=COLORS[name], label=LABELS[name])  # fmt: skip
    _label(axes, "MB", "what a training step adds\n(one row)")


def _generation_memory(axes: Any, kept: dict[str, Any]) -> None:
    """One line for all whose values are the same."""
    together: dict[tuple[int, ...], list[str]] = {}
    for name in NAMES:
        together.setdefault(tuple(kept[name].values()), []).append(name)
    for values, names in together.items():
        lengths, label = [int(x) for x in kept[names[0]]], ", ".join(LABELS[name] for name in names)
        axes.loglog(lengths, [value / 1e6 for value in values], "o-", color=COLORS[names[-1]], label=label)
    _label(axes, "MB", "kept while generating\n(state, or keys and values; one sequence)")


def _label(axes: Any, unit: str, title: str) -> None:
    lengths = sorted({int(x) for line in axes.get_lines() for x in line.get_xdata()})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("T, tokens")
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=10)
    axes.grid(which="both", alpha=0.25)
    axes.legend(fontsize=8)
