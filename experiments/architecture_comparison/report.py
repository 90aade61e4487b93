"""What is told: progress, where the numbers come from, and the summary over seeds."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import LLAMA, NAMES

import wkv
from wkv.speed.evidence import evidence

HERE = Path(__file__).resolve().parent


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For every contender: parameters, and mean, standard deviation and all of its bits per byte."""
    found: dict[str, Any] = {}
    for name in NAMES:
        own = [run for run in runs if run["name"] == name]
        if not own:
            continue
        found[name] = {key: own[0].get(key, name) for key in ("variant", "parameters", "learning_rate")}
        for kind in ("windows", "carried"):
            values = [run["bits_per_byte"][kind] for run in own if run["bits_per_byte"][kind] is not None]
            found[name][kind] = _spread(values) if values else None
    return found


def _spread(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    shown = None if math.isnan(deviation) else round(deviation, 4)
    return {"mean": round(statistics.mean(values), 4), "deviation": shown, "all": [round(x, 4) for x in values]}


def circumstances(arguments: list[str]) -> dict[str, Any]:
    """Where the numbers come from, whether other work ran at that time, and which form of each operator was used."""
    found = evidence(HERE / "run.py", arguments, ("torch", "numpy", "transformers", "tokenizers"))
    busy = (found["load_average"] or [0.0])[0] > torch.get_num_threads() + 0.5
    found["hardware"]["shared"] = f"other work {'ran' if busy else 'was not seen'} on the machine at the same time"
    return {**found, "operators": {name: backend(name) for name in NAMES if name != LLAMA}}


def backend(name: str) -> str:
    """The fastest usable backend of a model's operator."""
    return next(status.name for status in wkv.ops.backends(name.replace("rwkv", "wkv")) if status.usable)


_last_shown = 0.0


def show(text: str) -> None:
    """Progress: one line that changes on a terminal, a line every half minute elsewhere."""
    global _last_shown
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)
    elif text.endswith("\n") or time.monotonic() - _last_shown > 30:
        _last_shown = time.monotonic()
        print(text.rstrip("\n"), flush=True)


def labelled(what: str) -> Callable[[str], None]:
    """`show` with a name before each line."""
    return lambda text: show(f"{what}: {text}")


def table(result: dict[str, Any]) -> str:
    """Bits per byte in a few lines."""
    lines = [f"{'':8}{'parameters':>12}{'rate':>8}{'windows':>10}{'carried':>10}"]
    for name, row in result["summary"].items():
        scores = [f"{row[kind]['mean']:10.4f}" if row[kind] else f"{'-':>10}" for kind in ("windows", "carried")]
        lines.append(f"{name:8}{row['parameters']:12,}{row['learning_rate']:8g}{''.join(scores)}")
    return "\n".join(lines)
