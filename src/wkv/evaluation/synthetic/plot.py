"""The picture of a comparison: accuracy against bytes of state, against length, and against training steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wkv.errors import WkvError
from wkv.files import replacing

COLORS = ("#0b6e4f", "#c05a1c", "#3d5a9e", "#6f4a8e", "#a8862b", "#8c2f39", "#4a8fa0", "#555555")
MARKERS = "osD^vP*X"
Row = dict[str, Any]


def plot(result: Row, path: Path | str) -> None:
    """Draw a result, one row of panels for each case.

    Args:
        result: of `comparison.compare`.
        path: the PNG to write.

    Raises:
        WkvError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise WkvError("the plot needs matplotlib: pip install matplotlib") from error

    cases = result["cases"]
    panels = (
        [_against_state, _against_length, _against_steps] if result["by_length"] else [_against_state, _against_steps]
    )
    figure = Figure(figsize=(1 + 4.6 * len(panels), 0.9 + 3.4 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(cases), len(panels), sharey=True, squeeze=False)
    styles = _styles(cases)
    for case, axes_of_case in zip(cases, grid, strict=True):
        for draw, axes in zip(panels, axes_of_case, strict=True):
            draw(axes, result, case, styles)
            _finish(axes, result["chance"])
        axes_of_case[0].set_ylabel(f"{case['label']}\naccuracy".strip(), fontsize=9)
    _legend(figure, styles)
    figure.suptitle(result["task"], fontsize=11)
    with replacing([Path(path)]) as [temporary]:
        figure.savefig(temporary, dpi=150, format="png")


def _styles(cases: Sequence[Row]) -> dict[str, Row]:
    """Colour and marker of every contender, the same in all panels."""
    names = dict.fromkeys(entry["contender"] for case in cases for entry in case["entries"])
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
        for i, name in enumerate(names)
    }


def _against_state(axes: Any, result: Row, case: Row, styles: dict[str, Row]) -> None:
    """A line joins the widths of a contender; bars reach from the worst to the best seed."""
    for name, style in styles.items():
        entries = [entry for entry in case["entries"] if entry["contender"] == name]
        entries.sort(key=lambda entry: entry["state_bytes"])
        scores = [entry["accuracy"] for entry in entries]
        axes.errorbar([entry["state_bytes"] for entry in entries], *_bars(scores), linewidth=1.4, capsize=2, **style)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: _size(value))
    axes.set_xlabel("bytes of state")
    axes.set_title(result["score"], fontsize=8)


def _against_length(axes: Any, result: Row, case: Row, styles: dict[str, Row]) -> None:
    """The widest of each contender."""
    for entry in _widest(case):
        lengths = [test["length"] for test in entry["tests"]]
        scores = [test["accuracy"] for test in entry["tests"]]
        axes.errorbar(lengths, *_bars(scores), linewidth=1.4, capsize=2, **styles[entry["contender"]])
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("length of the test sequences")
    axes.set_title("test samples", fontsize=8)


def _against_steps(axes: Any, result: Row, case: Row, styles: dict[str, Row]) -> None:
    """The widest of each contender, every seed a line."""
    for entry in _widest(case):
        for run in _runs(result, case, entry):
            steps = [point["step"] for point in run["curve"]]
            accuracy = [point["accuracy"] for point in run["curve"]]
            style = {**styles[entry["contender"]], "markersize": 3}
            axes.plot(steps, accuracy, linewidth=1.2, alpha=0.85, **style)
    axes.set_xlim(left=0)
    axes.set_xlabel("training steps")
    axes.set_title("validation samples, every seed a line", fontsize=8)


def _widest(case: Row) -> list[Row]:
    """Of every contender the entry with the most parameters."""
    found: dict[str, Row] = {}
    for entry in case["entries"]:
        other = found.get(entry["contender"])
        if other is None or entry["parameters"] > other["parameters"]:
            found[entry["contender"]] = entry
    return list(found.values())


def _runs(result: Row, case: Row, entry: Row) -> list[Row]:
    """The runs behind an entry, those at the chosen learning rate."""
    return [
        run
        for run in result["runs"]
        if run["case"] == case["label"]
        and (run["contender"], run["width"]) == (entry["contender"], entry["width"])
        and run["settings"]["learning_rate"] == entry["learning_rate"]
    ]


def _bars(scores: Sequence[Row]) -> tuple[list[float], list[list[float]]]:
    """Means, and how far the worst and the best seed lie from them."""
    below = [score["mean"] - min(score["values"]) for score in scores]
    above = [max(score["values"]) - score["mean"] for score in scores]
    return [score["mean"] for score in scores], [below, above]


def _finish(axes: Any, chance: float) -> None:
    axes.axhline(chance, color="#888888", linewidth=1, linestyle="--", zorder=0)
    axes.set_ylim(-0.03, 1.05)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _legend(figure: Any, styles: dict[str, Row]) -> None:
    from matplotlib.lines import Line2D

    keys = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    keys.append(Line2D([], [], color="#888888", linestyle="--", label="blind guess"))
    figure.legend(handles=keys, loc="outside lower center", ncols=min(4, len(keys)), frameon=False, fontsize=8)


def _size(num_bytes: float) -> str:
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:g} {unit}"
    return f"{num_bytes:g}"
