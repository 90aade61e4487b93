"""Means, deviations and paired differences over seeds."""

from __future__ import annotations

import math
import statistics
from typing import Any

REFERENCE = "lora"


def mean(values: list[float]) -> float:
    """Of all; infinite if one is."""
    return statistics.fmean(values)


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (None of a single one), and all values."""
    deviation = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None
    rounded = None if deviation is None else round(deviation, 4)
    return {"mean": round(mean(values), 4), "deviation": rounded, "all": [round(value, 4) for value in values]}


def comparison(
    scores: dict[str, dict[int, list[float | None]]], losses: dict[str, list[list[float]]], looks: tuple[int, ...]
) -> dict[str, dict[str, Any]]:
    """Method -> spreads over seeds, and those of the differences to LoRA's of the same seed.

    Args:
        scores: method -> step -> bits per byte of the test texts for every seed; what is incomplete is left out.
        losses: method -> of every seed the loss of each batch before the step on it.
        looks: the steps that count.

    Returns:
        under "test" by step, and under "loss" by part of the run ("1-10") in nats per token.
    """
    parts = list(zip((0, *looks), looks, strict=False))
    means = {
        method: {f"{start + 1}-{end}": [mean(own[start:end]) for own in seeds] for start, end in parts}
        for method, seeds in losses.items()
        if all(len(own) >= looks[-1] for own in seeds)
    }
    tests = {
        method: {str(step): values for step, values in row.items() if None not in values}
        for method, row in scores.items()
    }
    return {method: {"test": _rows(tests, method), "loss": _rows(means, method)} for method in scores}


def _rows(values: dict[str, dict[str, Any]], method: str) -> dict[str, dict[str, Any]]:
    """Key -> spread, and that of the paired differences."""
    found = {}
    for key, own in values.get(method, {}).items():
        reference = values.get(REFERENCE, {}).get(key)
        found[key] = spread(own)
        if reference is not None and method != REFERENCE:
            found[key]["to_lora"] = spread([a - b for a, b in zip(own, reference, strict=True)])
    return found


def table(result: dict[str, Any]) -> str:
    """Both comparisons in a few lines."""
    lines = [f"bits per byte of held-out Python; the model as it was: {result['base']:.4f}"]
    for kind in ("common", "tuned"):
        for what in ("test", "loss"):
            lines.append(f"{kind} rate, {what}")
            for method, row in result[kind].items():
                cells = [f"  {key}: {_cell(found)}" for key, found in row[what].items()]
                lines.append(f"{method:10}{row['rate']:>8g}" + "".join(cells))
    return "\n".join(lines)


def _cell(found: dict[str, Any]) -> str:
    text = _number(found)
    return f"{text} (to LoRA {_number(found['to_lora'])})" if "to_lora" in found else text


def _number(found: dict[str, Any]) -> str:
    deviation = "" if found["deviation"] is None else f" ± {found['deviation']:.4f}"
    return f"{found['mean']:.4f}{deviation}"
