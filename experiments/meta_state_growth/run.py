"""A Meta-State model that grows half-way against large and small ones from scratch, at equal compute.

python experiments/meta_state_growth/run.py            # about an hour on one core
python experiments/meta_state_growth/run.py --quick    # tiny models, one seed, under 2 minutes

Every finished run stays in --runs; a second start, also after Ctrl-C, goes on from there. Several processes can share
the work by --contenders and --seeds once the learning rates are known (--stages sweep).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from figure import plot
from growing import CONTENDERS, Phase, Plan, Size, compute, train
from learning import Texts, load_texts

from wkv.evaluation import bits_per_byte
from wkv.files import replacing
from wkv.speed.evidence import evidence

HERE = Path(__file__).resolve().parent
KINDS = ("small", "large", "rwkv7")

PLAN = Plan(
    Size(layers=4, width=128, head_size=32, ffn=(512, 1024), attention=(128, 192), vocabulary=1024), context=256,
    rows=2, steps=1000, swept=0.25, warmup=20, rates=(2e-3, 4e-3, 8e-3), most_rates=5, seeds=(0, 1, 2),
    test_bytes=60_000, validation_bytes=24_000,
)  # fmt: skip
QUICK = replace(
    PLAN, size=Size(2, 64, 16, (128, 256), (64, 96), 512), context=64, steps=60, warmup=4, rates=(4e-3, 8e-3),
    most_rates=2, seeds=(0,), test_bytes=4_000, validation_bytes=2_000, documents=40,
)  # fmt: skip


class Experiment:
    """Everything that is made, and kept in a folder: one JSON file for each run.

    Args:
        plan: what is done.
        folder: for finished runs and the vocabulary.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.plan, self.folder = plan, folder
        self._texts: Texts | None = None

    @property
    def texts(self) -> Texts:
        """Read when first needed."""
        if self._texts is None:
            self._texts = load_texts(self.plan, self.folder)  # type: ignore[arg-type]  # it has what that one reads
        return self._texts

    def kept(self, name: str, make: Callable[[], Any] | None = None, **more: Any) -> Any:
        """The run of this name and these settings: kept, or made now (None without `make`)."""
        path = self.folder / f"{name}.json"
        wanted = json.loads(json.dumps({**self.plan.settings(), **more}))
        found = json.loads(path.read_text()) if path.is_file() else {"settings": None}
        if found["settings"] != wanted:
            if make is None:
                return None
            found = {"settings": wanted, "value": make()}
            with replacing([path]) as [temporary]:
                temporary.write_text(json.dumps(found) + "\n")
        return found["value"]

    def short_run(self, kind: str, rate: float, make: bool = True) -> float | None:
        """Bits per byte of the validation texts after a short run of the first seed."""

        def made() -> float:
            phases = (Phase(kind, 1.0),)
            model, facts = train(phases, self.plan, self.texts, self.plan.seeds[0], {kind: rate}, self.plan.swept)
            scored = bits_per_byte(model, self.texts.validation, self.texts.tokenizer)
            print(f"{kind} at {rate:g}: {scored:.4f} bits per byte, {facts['seconds']} s", flush=True)
            return scored

        found: float | None = self.kept(f"sweep-{kind}-{rate:g}", made if make else None, rate=rate)
        return found

    def sweep(self, kinds: list[str]) -> None:
        """Short runs of every model; more rates, by factors of two, while the best is the last on its side."""
        for kind in kinds:
            tried = {rate: self.short_run(kind, rate) for rate in self.plan.rates}
            while len(tried) < self.plan.most_rates:
                best = min(tried, key=lambda rate: tried[rate] or 0.0)
                if min(tried) < best < max(tried):
                    break
                rate = best / 2 if best == min(tried) else 2 * best
                tried[rate] = self.short_run(kind, rate)

    def tried(self, kind: str) -> dict[float, float]:
        """The sweep of a model as far as it is known: learning rate -> bits per byte."""
        rates = sorted(float(path.stem.split("-", 2)[2]) for path in self.folder.glob(f"sweep-{kind}-*.json"))
        found = {rate: self.short_run(kind, rate, make=False) for rate in rates}
        return {rate: value for rate, value in found.items() if value is not None}

    def rates(self) -> dict[str, float]:
        """The best rate of each model that was swept. The grown one takes those of its two parts."""
        found = {kind: self.tried(kind) for kind in KINDS}
        return {kind: min(row, key=lambda rate: row[rate]) for kind, row in found.items() if row}

    def run(self, name: str, seed: int, make: bool = True) -> dict[str, Any] | None:
        """One run and its bits per byte on the test texts."""
        phases, rates = CONTENDERS[name], self.rates()
        if any(phase.kind not in rates for phase in phases):
            return None

        def made() -> dict[str, Any]:
            model, facts = train(phases, self.plan, self.texts, seed, rates)
            facts["bits_per_byte"] = bits_per_byte(model, self.texts.test, self.texts.tokenizer)
            print(f"{name}, seed {seed}: {facts['bits_per_byte']:.4f}, {facts['seconds']} s", flush=True)
            return {"name": name, "seed": seed, **facts}

        own = {phase.kind: rates[phase.kind] for phase in phases}
        key = name.replace(", ", "-")
        found: dict[str, Any] | None = self.kept(f"run-{key}-{seed}", made if make else None, rates=own)
        return found

    def result(self, arguments: list[str]) -> dict[str, Any]:
        """Everything that is finished."""
        plan, names = self.plan, list(CONTENDERS)
        runs = [run for seed in plan.seeds for name in names if (run := self.run(name, seed, make=False)) is not None]
        with torch.device("meta"):
            costs = {kind: compute(plan.size.build(kind)) for kind in KINDS}
        return {
            **evidence(HERE / "run.py", arguments, ("torch", "numpy", "tokenizers")),
            "plan": asdict(plan),
            "multiplications_per_token": costs,
            "sweep": {kind: {f"{rate:g}": value for rate, value in self.tried(kind).items()} for kind in KINDS},
            "learning_rates": self.rates(),
            "summary": summary(runs),
            "grown_less": {name: difference(runs, "grown", name) for name in names if name != "grown"},
            "small_less_rwkv7": difference(runs, "small", "rwkv7"),
            "runs": runs,
        }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """For every contender: parameters, and mean, deviation and all of its bits per byte."""
    own = {name: [run for run in runs if run["name"] == name] for name in CONTENDERS}
    return {
        name: {"parameters": rows[0]["parameters"], "bits_per_byte": spread([run["bits_per_byte"] for run in rows])}
        for name, rows in own.items()
        if rows
    }


def difference(runs: list[dict[str, Any]], one: str, other: str) -> dict[str, Any] | None:
    """Bits per byte of `one` less those of `other`, seed by seed; below 0 if `one` is better."""
    values = {name: {run["seed"]: run["bits_per_byte"] for run in runs if run["name"] == name} for name in (one, other)}
    seeds = sorted(values[one].keys() & values[other].keys())
    return spread([values[one][seed] - values[other][seed] for seed in seeds]) if seeds else None


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation (None for a single value) and the values."""
    deviation = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 4), "deviation": deviation, "all": [round(x, 4) for x in values]}


def shown(found: dict[str, Any]) -> str:
    """The comparison in a few lines."""
    lines = [
        f"{name:12}{row['parameters']:>10,}  {_cell(row['bits_per_byte'])}" for name, row in found["summary"].items()
    ]
    lines += [f"grown less {name:12}{_cell(row)}" for name, row in found["grown_less"].items() if row]
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['mean']:+.4f} ± {row['deviation'] or 0:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models; results go to --runs, not here")
    parser.add_argument("--stages", nargs="+", choices=("sweep", "train"), default=["sweep", "train"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="models of the stage sweep")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=None)
    parser.add_argument("--runs", type=Path, default=None, help="folder of finished runs")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = QUICK if options.quick else PLAN
    folder = options.runs or Path("runs") / f"meta_state_growth{'_quick' * options.quick}"
    experiment = Experiment(plan, folder)
    try:
        if "sweep" in options.stages:
            experiment.sweep(options.kinds)
        if "train" in options.stages:
            for seed in options.seeds or plan.seeds:
                for name in options.contenders:
                    if experiment.run(name, seed) is None:
                        sys.exit(f"no learning rate is known for {name}: run the stage sweep first")
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished is in {folder}, and the same command goes on from there")
        sys.exit(130)
    found, out = experiment.result(["--quick"] * options.quick), folder if options.quick else HERE
    with replacing([out / "result.json"]) as [temporary]:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    plot(found, out / "plot.png")
    print(shown(found))


if __name__ == "__main__":
    main()
