"""The picture: how much of the memory's read bandwidth each contender uses while it decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wkv.errors import WkvError
from wkv.files import replacing

COLORS = {"wkv": "#0b6e4f", "rwkv": "#6f4a8e", "llama.cpp": "#c05a1c"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw a result, one panel for each model.

    Args:
        result: of `bench.run`.
        path: the PNG to write.

    Raises:
        WkvError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise WkvError("the plot needs matplotlib: pip install matplotlib") from error

    shapes = {name: shape for name, shape in result["shapes"].items() if shape["threads"]}
    names = _names(shapes)
    figure = Figure(figsize=(1.8 + 4.6 * max(1, len(shapes)), 1.6 + 0.42 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(shapes)), sharey=True, squeeze=False)[0]
    for axes, (title, shape) in zip(panels, shapes.items(), strict=False):
        _panel(axes, title, shape, names)
    if shapes:
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.4, -0.6)
        _legend(figure, next(iter(shapes.values()))["threads"])
    figure.suptitle("Decoding one sequence: share of the memory's read bandwidth reached", fontsize=12)
    with replacing([path]) as [temporary]:
        figure.savefig(temporary, dpi=150, format="png")


def _names(shapes: dict[str, Any]) -> list[str]:
    """All contenders that decoded, in the order of the results."""
    names: dict[str, None] = {}
    for shape in shapes.values():
        for found in shape["threads"].values():
            names.update(dict.fromkeys(name for name, row in found["contenders"].items() if "bandwidth_share" in row))
    return list(names)


def _panel(axes: Any, title: str, shape: dict[str, Any], names: list[str]) -> None:
    counts = list(shape["threads"])
    height = 0.84 / len(counts)
    shares = [0.0]
    for place, count in enumerate(counts):
        for row, name in enumerate(names):
            found = shape["threads"][count]["contenders"].get(name, {})
            if "bandwidth_share" not in found:
                continue
            share = 100 * found["bandwidth_share"]
            shares.append(share)
            y = row + (place - (len(counts) - 1) / 2) * height
            axes.barh(y, share, height * 0.94, color=COLORS[program(name)], alpha=_shade(place, len(counts)))
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            axes.text(share + 1.2, y, f"{share:.0f} %", va="center", fontsize=7, bbox=box)
            speed = f"{found['decode_tokens_per_second']:.{1 if found['decode_ms'] > 20 else 0}f} tokens/s"
            axes.text(1.2, y, speed, va="center", fontsize=6.5, color="white")
    rates = [f"{shape['threads'][count]['bandwidth']['gb_per_second']:.1f}" for count in counts]
    axes.set_title(f"RWKV-7 {title} (100 % = {' / '.join(rates)} GB/s)", fontsize=9)
    for place, count in enumerate(counts):
        rates_of_pages = shape["threads"][count]["bandwidth"]
        usual = 100 * rates_of_pages["usual_pages_best_gb_per_second"] / rates_of_pages["gb_per_second"]
        axes.axvline(usual, color="#444444", linewidth=1, linestyle=":", alpha=_shade(place, len(counts)), zorder=0)
    axes.axvline(100, color="#555555", linewidth=1, linestyle="--", zorder=1)
    axes.set_xlim(0, max(115, 1.12 * max(shares)))  # weights that fit into the cache are read faster than memory
    axes.set_xlabel("% of read bandwidth")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _shade(place: int, count: int) -> float:
    return 1.0 if count == 1 else 0.6 + 0.4 * place / (count - 1)


def _legend(figure: Any, counts: Any) -> None:
    """Which shade is how many threads."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    keys: list[Any] = [
        Patch(color="#444444", alpha=_shade(place, len(counts)), label=f"{count} thread{'s' * (count != '1')}")
        for place, count in enumerate(counts)
    ]
    keys.append(Line2D([], [], color="#444444", linestyle=":", label="limit with memory in pages of the usual size"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=8)


def program(name: str) -> str:
    """Of a contender's name: "llama.cpp Q8_0" -> "llama.cpp"."""
    return name.split()[0]
