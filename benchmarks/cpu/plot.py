"""Work out a result's tables and picture again from what its rounds measured.

python benchmarks/cpu/plot.py benchmarks/cpu/results/decode_prefill_0.1b.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from wkv.speed.bench import write_files
from wkv.speed.plot import plot
from wkv.speed.report import summary
from wkv.speed.rounds import Measured


def main(source: Path) -> None:
    """Rewrite the JSON's summaries, the tables and the picture beside it."""
    result = json.loads(source.read_text(encoding="utf-8"))
    for shape in result["shapes"].values():
        measured = Measured(shape["contenders"], shape["failed"], shape["raw_rounds"], shape["complete"])
        shape |= summary(measured, result["settings"]["prompt"])
    write_files(result, source)
    plot(result, source.with_suffix(".png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
