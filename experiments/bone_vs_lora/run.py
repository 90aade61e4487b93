"""Bone, MiSS, LoRA, PiSSA and OLoRA at equal parameters: the starter model learns to read Python.

python experiments/bone_vs_lora/run.py            # about 45 minutes on one core
python experiments/bone_vs_lora/run.py --quick    # a few steps of everything, under 2 minutes

Every finished run stays in --runs; a second start, also after Ctrl-C, goes on from there. Needs "wkv[tune]".
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from figure import plot
from learning import FULL, METHODS, Contender, Plan, Texts, kept_name, load_texts, train, update_ranks
from report import comparison, mean, table

from wkv.evaluation import bits_per_byte
from wkv.files import replacing
from wkv.speed.evidence import evidence

HERE = Path(__file__).resolve().parent
STAGES = ("sweep", "train", "test", "ranks")
COMMON, TUNED = "common", "tuned"

PLAN = Plan(
    rows=1, context=64, steps=60, warmup=3, looks=(10, 30, 60), seeds=(0, 1, 2, 3, 4), sweep_seeds=2,
    rates=(1e-3, 3e-3, 1e-2), ladder=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    common=1e-3, validation_bytes=2_400, test_bytes=8_000,
)  # fmt: skip
QUICK = replace(
    PLAN, steps=4, looks=(2, 4), seeds=(0,), sweep_seeds=1, rates=(3e-3,), ladder=(3e-3,), common=3e-3,
    validation_bytes=400, test_bytes=400, files=60,
)  # fmt: skip


class Experiment:
    """All stages over one folder of finished pieces.

    Args:
        plan: what is done.
        methods: the contenders.
        folder: for pieces and trained adapters.
        arguments: of the command line, for the record.
    """

    def __init__(self, plan: Plan, methods: list[str], folder: Path, arguments: list[str]) -> None:
        self.plan, self.methods, self.folder, self.arguments = plan, methods, folder, arguments
        folder.mkdir(parents=True, exist_ok=True)
        self.texts: Texts = load_texts(plan)
        self.settings = json.loads(json.dumps({**plan.training(), "sha256": self.texts.facts["sha256"]}))

    # ---- pieces ----

    def find(self, name: str, **more: Any) -> Any:
        """What is kept under this name for the settings of now, or None."""
        path = self.folder / f"{name}.json"
        kept = json.loads(path.read_text()) if path.is_file() else {}
        return kept.get("value") if kept.get("settings") == {**self.settings, **more} else None

    def get(self, name: str, make: Callable[[], Any], **more: Any) -> Any:
        """The piece; made and kept now if need be."""
        value = self.find(name, **more)
        if value is None:
            value = make()
            with replacing([self.folder / f"{name}.json"]) as [temporary]:
                temporary.write_text(json.dumps({"settings": {**self.settings, **more}, "value": value}) + "\n")
        return value

    # ---- training ----

    def sweep(self) -> None:
        """First rates, first seeds; then every method's neighbours of its best rate, until none is better."""
        for seed in self.sweep_seeds:
            for rate in self.plan.rates:
                for method in self.methods:
                    self.run(method, seed, rate)
        for method in self.methods:
            while (rate := self.untried(method)) is not None:
                for seed in self.sweep_seeds:
                    self.run(method, seed, rate)

    @property
    def sweep_seeds(self) -> tuple[int, ...]:
        """Those that rates are chosen with."""
        return self.plan.seeds[: self.plan.sweep_seeds]

    def train(self) -> None:
        """The runs that count: every seed at each method's own rate and at the common one."""
        for seed in self.plan.seeds:
            for method in self.methods:
                for rate in self.counting(method):
                    self.run(method, seed, rate)

    def counting(self, method: str) -> list[float]:
        """The rates at which a method is shown."""
        return sorted({rate for kind in (TUNED, COMMON) if (rate := self.rate(kind, method)) is not None})

    def run(self, method: str, seed: int, rate: float) -> dict[str, Any]:
        """One run."""

        def make() -> dict[str, Any]:
            found = train(method, seed, rate, self.plan, self.texts, self.folder)
            print(f"{method}, seed {seed}, rate {rate:g}: {found['validation']}, {found['seconds']} s", flush=True)
            return found

        found: dict[str, Any] = self.get(f"run-{method}-{seed}-{rate:g}", make)
        return found

    def runs(self) -> list[dict[str, Any]]:
        """All finished ones."""
        names = (f"run-{m}-{s}-{r:g}" for m in self.methods for r in self.plan.ladder for s in self.plan.seeds)
        return [found for name in names if (found := self.find(name)) is not None]

    def tried(self, method: str) -> dict[float, float]:
        """Rate -> mean over the sweep's seeds of the validation score; a rate at which a run diverged has infinity."""
        rows = {}
        for rate in self.plan.ladder:
            own = [self.find(f"run-{method}-{seed}-{rate:g}") for seed in self.sweep_seeds]
            if None not in own:
                rows[rate] = mean([math.inf if run["diverged"] else run["validation"] for run in own])
        return rows

    def best(self, method: str) -> float | None:
        """The tuned rate."""
        tried = self.tried(method)
        return min(tried, key=lambda rate: tried[rate]) if tried else None

    def untried(self, method: str) -> float | None:
        """A neighbour of the best rate that has not been tried."""
        tried, ladder = self.tried(method), self.plan.ladder
        place = ladder.index(min(tried, key=lambda rate: tried[rate]))
        return next((rate for rate in ladder[max(0, place - 1) : place + 2] if rate not in tried), None)

    # ---- the result ----

    def test(self) -> None:
        """Scores of the test texts: of the base, and of each method at its own rate and at the common one."""
        self.score(None)
        for step in sorted(self.plan.looks, reverse=True):  # the end of training first
            for seed in self.plan.seeds:
                for method in self.methods:
                    for rate in self.counting(method):
                        self.score(method, seed, rate, step)

    def rate(self, kind: str, method: str) -> float | None:
        """Of a method in one of the two comparisons; full fine-tuning is shown at its own alone."""
        return self.best(method) if kind == TUNED or method == FULL else self.plan.common

    def score(
        self, method: str | None, seed: int = 0, rate: float = 0.0, step: int = 0, make: bool = True
    ) -> float | None:
        """Bits per byte of the test texts after a step of a run, None if it diverged before; of the base by default."""

        def scored() -> dict[str, float | None]:
            file = self.folder / kept_name(method or FULL, seed, rate, step)
            if method is not None and not file.is_file():
                return {"score": None}
            contender = Contender(method or FULL, file=file if method else None)
            return {"score": bits_per_byte(contender.model, self.texts.test)}

        name, more = f"test-{method}-{seed}-{rate:g}-{step}", {"test_bytes": self.plan.test_bytes}
        found = self.get(name, scored, **more) if make else self.find(name, **more)
        return found and found["score"]

    def ranks(self) -> None:
        """What the runs at the tuned rates did to the weights; first seed."""
        for method in self.methods:
            if method != FULL:
                self.rank(method)

    def rank(self, method: str, make: bool = True) -> Any:
        """Of one method."""
        seed, rate = self.plan.seeds[0], self.best(method)
        if rate is None:
            return None
        file = self.folder / kept_name(method, seed, rate, self.plan.steps)
        name = f"ranks-{method}-{seed}-{rate:g}"
        return self.get(name, lambda: update_ranks(method, file)) if make else self.find(name)

    def comparison(self, kind: str) -> dict[str, dict[str, Any]]:
        """Method -> its rate, and what `report.comparison` says of its scores."""
        rates = {method: rate for method in self.methods if (rate := self.rate(kind, method)) is not None}
        scores = {
            method: {
                step: [self.score(method, seed, rate, step, make=False) for seed in self.plan.seeds]
                for step in self.plan.looks
            }
            for method, rate in rates.items()
        }
        runs = {m: [self.find(f"run-{m}-{seed}-{rate:g}") for seed in self.plan.seeds] for m, rate in rates.items()}
        losses = {m: [run["losses"] for run in own] for m, own in runs.items() if None not in own}
        found = comparison(scores, losses, self.plan.looks)
        return {method: {"rate": rates[method], **row} for method, row in found.items()}

    def result(self) -> dict[str, Any]:
        """Everything that is finished."""
        runs = self.runs()
        return {
            **evidence(HERE / "run.py", self.arguments, ("torch", "numpy", "peft")),
            "plan": asdict(self.plan),
            "ranks_of_methods": {method: METHODS.get(method) for method in self.methods},
            "parameters": {run["method"]: run["parameters"] for run in runs},
            "text": self.texts.facts,
            "base": self.score(None, make=False),
            "learning_rates": {m: {f"{r:g}": finite(x) for r, x in self.tried(m).items()} for m in self.methods},
            COMMON: self.comparison(COMMON),
            TUNED: self.comparison(TUNED),
            "first_gradient": first_gradients(runs),
            "update_ranks": {m: ranks for m in self.methods if m != FULL and (ranks := self.rank(m, make=False))},
            "diverged": [[run["method"], run["seed"], run["rate"]] for run in runs if run["diverged"]],
            "runs": runs,
        }

    def write(self, out: Path) -> dict[str, Any]:
        """result.json and plot.png of everything so far."""
        result = self.result()
        with replacing([out / "result.json"]) as [temporary]:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        plot(result, out / "plot.png")
        return result


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def first_gradients(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Method -> mean norm of the first gradient over seeds, and the largest share of parameters without one."""
    found = {}
    for method in {run["method"]: None for run in runs}:
        own = {run["seed"]: run["first_gradient"] for run in runs if run["method"] == method}.values()
        norm = statistics.fmean(each["norm"] for each in own)
        found[method] = {"norm": norm, "zero_share": max(each["zero_share"] for each in own)}
    return found


def check_counts(methods: list[str]) -> None:
    """All adapters have the same number of parameters, or the comparison would not be one."""
    counts = {m: sum(p.numel() for p in Contender(m).parameters().values()) for m in methods if m != FULL}
    if len(set(counts.values())) > 1:
        sys.exit(f"unequal numbers of parameters: {counts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps; results go to --runs, not here")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, FULL], default=[*METHODS, FULL])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--runs", type=Path, default=None, help="folder of finished pieces")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.runs or Path("runs") / f"bone_vs_lora{'_quick' * options.quick}"
    check_counts(options.methods)
    every = options.methods == [*METHODS, FULL]
    arguments = ["--quick"] * options.quick + ([] if every else ["--methods", *options.methods])
    experiment = Experiment(QUICK if options.quick else PLAN, options.methods, folder, arguments)
    try:
        for stage in STAGES:
            if stage in options.stages:
                getattr(experiment, stage)()
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished is in {folder}, and the same command goes on from there")
        sys.exit(130)
    print(table(experiment.write(folder if options.quick else HERE)))


if __name__ == "__main__":
    main()
