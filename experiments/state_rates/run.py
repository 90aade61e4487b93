"""Learning rates of state tuning: `wkv finetune` on the conversations of examples/finetune_on_chats.py.

python experiments/state_rates/run.py            # about 15 minutes on one core
python experiments/state_rates/run.py --quick    # one rate, a few steps, under 2 minutes

Every finished run stays in --runs; a second start, also after Ctrl-C, goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "examples"))  # the conversations

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from finetune_on_chats import write_chats  # noqa: E402
from wkv.cli.finetune import finetune_recipe  # noqa: E402
from wkv.files import replacing  # noqa: E402
from wkv.speed.evidence import evidence  # noqa: E402
from wkv.training import train  # noqa: E402

RATES = {"state": (0.01, 0.03, 0.1, 0.3, 1.0), "fullstate": (0.01, 0.1, 0.3, 1.0), "state-kernel": (0.01, 0.1, 0.3)}
SEEDS = (0, 1, 2)


def run(method: str, rate: float, seed: int, runs: Path, changes: list[str]) -> float:
    """Bits per byte of held-out answers, read from the run's folder if it is finished."""
    kept = runs / f"{method}-{rate:g}-{seed}.json"
    if kept.is_file():
        return float(json.loads(kept.read_text()))
    chats = runs / "chats.jsonl"
    rates = [f"train.learning_rate={rate:g}", f"train.final_learning_rate={rate / 100:g}", f"train.seed={seed}"]
    recipe = finetune_recipe("starter", str(chats), method, [*rates, *changes])
    found = train(recipe, runs / kept.stem).bits_per_byte
    with replacing([kept]) as [temporary]:
        temporary.write_text(json.dumps(found))
    print(f"{kept.stem}: {found:.3f}", flush=True)
    return found


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation and all values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "values": values}


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """One line per method."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for method, rows in found.items():
        rates, means = [float(rate) for rate in rows], [row["mean"] for row in rows.values()]
        axes.errorbar(rates, means, [row["deviation"] or 0 for row in rows.values()], marker="o", label=method)
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="bits per byte of held-out answers")
    axes.legend()
    axes.grid(alpha=0.3)
    with replacing([path]) as [temporary]:
        figure.savefig(temporary, dpi=150, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps; results go to --runs, not here")
    parser.add_argument("--runs", type=Path, default=None, help="folder of finished runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = options.runs or Path("runs") / f"state_rates{'_quick' * options.quick}"
    runs.mkdir(parents=True, exist_ok=True)
    write_chats(runs / "chats.jsonl")
    changes = ["train.epochs=0.2"] if options.quick else []
    rates, seeds = ({"state": (0.3,)}, (0,)) if options.quick else (RATES, SEEDS)
    found = {
        method: {f"{rate:g}": spread([run(method, rate, seed, runs, changes) for seed in seeds]) for rate in own}
        for method, own in rates.items()
    }
    out = runs if options.quick else HERE
    books = evidence(HERE / "run.py", ["--quick"] * options.quick, ("torch", "numpy"))
    with replacing([out / "result.json"]) as [temporary]:
        temporary.write_text(json.dumps({**books, "seeds": list(seeds), "bits_per_byte": found}, indent=1) + "\n")
    plot(found, out / "plot.png")


if __name__ == "__main__":
    main()
