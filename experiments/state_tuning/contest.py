"""Contenders over one folder of finished pieces: pre-trained models, sweeps of learning rates, tuned runs.

Several processes may work on one folder, each on other contenders or seeds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from learning import Plan, examples, pretrain, scores, tune

import wkv
from wkv.files import replacing


class Contender(NamedTuple):
    """An adapter that is tuned.

    Args:
        size: "small" or "large", the model.
        method: of `wkv.tuning.create`.
        options: of the method.
        samples: how many strings it is tuned on; None: all numbers of the plan, one after the other.
    """

    size: str
    method: str
    options: dict[str, Any]
    samples: tuple[int, ...] | None = None


class Pieces:
    """JSON values under names; one that was made with other settings counts as missing."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.settings = folder, settings

    def find(self, name: str, **more: Any) -> Any:
        """What is kept, or None."""
        path = self.folder / f"{name}.json"
        kept = json.loads(path.read_text()) if path.is_file() else {}
        return kept.get("value") if kept.get("settings") == self._wanted(more) else None

    def get(self, name: str, make: Callable[[], Any], **more: Any) -> Any:
        """The piece; made and kept now if need be."""
        value = self.find(name, **more)
        if value is None:
            value = make()
            with replacing([self.folder / f"{name}.json"]) as [temporary]:
                temporary.write_text(json.dumps({"settings": self._wanted(more), "value": value}) + "\n")
        return value

    def _wanted(self, more: dict[str, Any]) -> dict[str, Any]:
        wanted: dict[str, Any] = json.loads(json.dumps({**self.settings, **more}))
        return wanted


class Contest:
    """All runs of an experiment.

    Args:
        plan: what is done.
        contenders: by name.
        folder: for the runs.
        models: folder for pre-trained models; `folder` by default.
    """

    def __init__(self, plan: Plan, contenders: dict[str, Contender], folder: Path, models: Path | None = None) -> None:
        self.plan, self.contenders = plan, contenders
        self.pieces = Pieces(folder, plan.settings())
        self.models = Pieces(models or folder, {"rows": plan.rows, "instructed": plan.instructed})

    # ---- pre-trained models ----

    def model(self, kind: str, seed: int) -> Path:
        """The file of a pre-trained model, "small" or "large"."""
        path = self.models.folder / f"{kind}-{seed}.safetensors"
        size = getattr(self.plan, kind)

        def make() -> dict[str, Any]:
            found = pretrain(size, self.plan, seed, path)
            print(f"{kind}, seed {seed}: loss {found['losses'][-1]}, {found['seconds']} s", flush=True)
            return found

        self.models.get(f"{kind}-{seed}", make, size=asdict(size))
        return path

    def pretrained(self, kind: str, seed: int) -> dict[str, Any] | None:
        """What is known about its training."""
        found: dict[str, Any] | None = self.models.find(f"{kind}-{seed}", size=asdict(getattr(self.plan, kind)))
        return found

    def untuned(self, kind: str, seed: int, name: str, make: bool = True) -> dict[str, float] | None:
        """Accuracy on the test strings of a transform: alone, behind four examples, behind the instruction."""

        def scored() -> dict[str, float]:
            model = wkv.load_model(self.model(kind, seed))
            asked = {"alone": {}, "examples": {"shots": 4}, "instruction": {"instructed": True}}
            return {
                how: scores(model, examples(name, seed, "test", self.plan.scored, **options))["accuracy"]
                for how, options in asked.items()
            }

        key, size = f"untuned-{kind}-{seed}-{name}", asdict(getattr(self.plan, kind))
        found: dict[str, float] | None = (
            self.pieces.get(key, scored, size=size) if make else self.pieces.find(key, size=size)
        )
        return found

    # ---- tuned ones ----

    def samples(self, contender: str) -> tuple[int, ...]:
        """How many strings it is tuned on."""
        return self.contenders[contender].samples or self.plan.samples

    def run(
        self, contender: str, samples: int, rate: float, seed: int, name: str, make: bool = True
    ) -> dict[str, Any] | None:
        """One run."""
        kind, method, options, _ = self.contenders[contender]

        def made() -> dict[str, Any]:
            found = tune(self.model(kind, seed), method, options, name, seed, rate, samples, self.plan)
            test, seconds = found["test"]["accuracy"], found["seconds"]
            print(f"{contender}, {samples}, {rate:g}, seed {seed}, {name}: {test:.3f}, {seconds} s", flush=True)
            return found

        key = f"run-{contender}-{samples}-{rate:g}-{seed}-{name}"
        more = {"size": asdict(getattr(self.plan, kind)), "options": options}
        found: dict[str, Any] | None = self.pieces.get(key, made, **more) if make else self.pieces.find(key, **more)
        return found

    def sweep(self, names: Sequence[str]) -> None:
        """First rates, then the next ones while the best is at an edge; all on the first seed."""
        for contender in names:
            for samples in self.samples(contender):
                rates: list[float] = list(self.plan.rates)
                while rates:
                    for rate in rates:
                        for name in self.plan.swept:
                            self.run(contender, samples, rate, self.plan.seeds[0], name)
                    rates = self.beyond_edge(contender, samples)

    def tried(self, contender: str, samples: int) -> dict[float, dict[str, float]]:
        """Rate -> mean scores of the validation strings over the swept transforms, if all are there."""
        found = {}
        for rate in self.plan.ladder:
            runs = [self.run(contender, samples, rate, self.plan.seeds[0], n, make=False) for n in self.plan.swept]
            scored = [run["validation"] for run in runs if run is not None]
            if len(scored) == len(runs):
                found[rate] = {key: statistics.fmean(s[key] for s in scored) for key in ("accuracy", "loss")}
        return found

    def best(self, contender: str, samples: int) -> float | None:
        """The rate with the lowest validation loss."""
        tried = self.tried(contender, samples)
        return min(tried, key=lambda rate: tried[rate]["loss"]) if tried else None

    def beyond_edge(self, contender: str, samples: int) -> list[float]:
        """The next rate to try, if the best is the smallest or the largest one."""
        tried, ladder, best = self.tried(contender, samples), self.plan.ladder, self.best(contender, samples)
        assert best is not None
        place = ladder.index(best)
        for edge, step in ((min, -1), (max, 1)):
            if best == edge(tried) and 0 <= place + step < len(ladder):
                return [ladder[place + step]]
        return []

    def tune(self, names: Sequence[str], seeds: Sequence[int]) -> None:
        """All transforms at the tuned rates."""
        for seed in seeds:
            for name in self.plan.transforms:
                for contender in names:
                    for samples in self.samples(contender):
                        rate = self.best(contender, samples)
                        assert rate is not None, "sweep first"
                        self.run(contender, samples, rate, seed, name)

    def tuned(self, contender: str, samples: int) -> dict[str, Any] | None:
        """Rate, runs by seed and transform, and the accuracies of the test strings; None if a run is missing."""
        rate = self.best(contender, samples)
        if rate is None:
            return None
        runs = {
            seed: {name: self.run(contender, samples, rate, seed, name, make=False) for name in self.plan.transforms}
            for seed in self.plan.seeds
        }
        if any(run is None for own in runs.values() for run in own.values()):
            return None
        accuracies = {s: {n: run["test"]["accuracy"] for n, run in own.items() if run} for s, own in runs.items()}
        first: Any = runs[self.plan.seeds[0]][self.plan.transforms[0]]
        return {"rate": rate, "parameters": first["parameters"], **table(accuracies), "runs": runs}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (None of a single one), and all values."""
    deviation = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 4), "deviation": deviation, "all": [round(v, 4) for v in values]}


def table(accuracies: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Of seed -> transform -> accuracy: the spread of the means over transforms, and of each transform."""
    names = next(iter(accuracies.values()))
    return {
        "accuracy": spread([statistics.fmean(own.values()) for own in accuracies.values()]),
        "transforms": {name: spread([own[name] for own in accuracies.values()]) for name in names},
    }
