"""Draw the picture and the tables of a result again: `python benchmarks/cpu/plot.py results/decode_prefill.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from wkv.speed.plot import plot
from wkv.speed.report import markdown

if __name__ == "__main__":
    source = Path(sys.argv[1])
    result = json.loads(source.read_text(encoding="utf-8"))
    plot(result, source.with_suffix(".png"))
    source.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
