"""RWKV-4, 5, 6, 7 and a Llama at equal parameters and equal tokens: bits per byte, speed, memory.

python experiments/architecture_comparison/run.py                 # 2 million tokens a run: two hours on one core
python experiments/architecture_comparison/run.py --plan short    # 0.2 million tokens a run: about 15 minutes
python experiments/architecture_comparison/run.py --plan quick    # tiny models, one seed, under 2 minutes in all

Every finished piece (a training run, a measurement) stays in --runs; a second run, also after Ctrl-C, goes on from
there. The result is written anew after each. Needs `pip install transformers` beside "wkv[train]".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import BETAS, LLAMA, NAMES, TOLERANCE, VARIANTS, WEIGHT_DECAY, Size, build
from figure import plot
from learning import STRIDE, WINDOW, Plan, Texts, load_texts, score, train, windowed_bits_per_byte
from measures import generation_memory, speed, training_memory, training_peak
from report import circumstances, labelled, show, summary, table

from wkv.files import replacing

HERE = Path(__file__).resolve().parent
STAGES = ("sweep", "train", "speed", "memory")

LONG = Plan(
    Size(layers=4, width=128, vocabulary=2048), context=256, rows=4, steps=2000, sweep_steps=200, warmup=50,
    rates=(2e-3, 4e-3, 8e-3), most_rates=5, seeds=(0, 1, 2), test_bytes=60_000, validation_bytes=24_000,
)  # fmt: skip
SHORT = replace(LONG, rows=2, steps=400, sweep_steps=160, warmup=20)
QUICK = Plan(
    Size(layers=2, width=64, vocabulary=512), context=64, rows=4, steps=30, sweep_steps=10, warmup=3,
    rates=(4e-3, 1.6e-2), most_rates=2, seeds=(0,), test_bytes=4_000, validation_bytes=2_000, documents=40,
)  # fmt: skip
PLANS = {"long": LONG, "short": SHORT, "quick": QUICK}


@dataclass(frozen=True)
class Measures:
    """Lengths and repetitions of the measurements of speed and memory."""

    speed_lengths: tuple[int, ...] = (256, 1024)
    tokens_per_step: int = 1024
    rounds: int = 7
    training_lengths: tuple[int, ...] = (256, 1024, 4096)
    repeats: int = 1
    kept_lengths: tuple[int, ...] = tuple(256 * 4**i for i in range(5))
    cache_lengths: tuple[int, ...] = (256, 1024)


QUICK_MEASURES = Measures((64,), 128, 1, (256,), 1, (64, 256), (64,))


class Pieces:
    """Finished parts of the experiment, one JSON file each; one made with other settings is made anew.

    Args:
        folder: where they are.
        changed: is called after each new piece.
    """

    def __init__(self, folder: Path, changed: Callable[[], object]) -> None:
        self.folder, self._changed = folder, changed

    def find(self, name: str, settings: dict[str, Any]) -> Any:
        """What is kept under this name for these settings, or None."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        kept = json.loads(path.read_text())
        return kept["value"] if kept["settings"] == json.loads(json.dumps(settings)) else None

    def get(self, name: str, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
        """The piece; made and kept now if need be."""
        value = self.find(name, settings)
        if value is None:
            value = make()
            with replacing([self.folder / f"{name}.json"]) as [temporary]:
                temporary.write_text(json.dumps({"settings": settings, "value": value}, indent=1) + "\n")
            self._changed()
        return value


class Experiment:
    """All stages over one folder of pieces.

    Args:
        plan, measures: what is done.
        folder: for pieces and the vocabulary.
        out: folder of result.json and plot.png.
        arguments: of the command line, for the record and for processes of their own.
    """

    def __init__(self, plan: Plan, measures: Measures, folder: Path, out: Path, arguments: list[str]) -> None:
        self.plan, self.measures, self.out, self.arguments = plan, measures, out, arguments
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.pieces = folder, Pieces(folder, self.write)
        self._texts: Texts | None = None

    @property
    def texts(self) -> Texts:
        """Read when first needed."""
        if self._texts is None:
            show("reading the text")
            self._texts = load_texts(self.plan, self.folder)
        return self._texts

    # ---- learning ----

    def sweep(self) -> None:
        """Short runs of every contender; more rates, by factors of two, while the best is the last on its side."""
        for variant in (variant for variants in VARIANTS.values() for variant in variants):
            tried = {rate: self.short_run(variant, rate) for rate in self.plan.rates}
            while len(tried) < self.plan.most_rates and (fresh := _beyond_edge(tried)) is not None:
                tried[fresh] = self.short_run(variant, fresh)

    def short_run(self, name: str, rate: float) -> float | None:
        """Bits per byte of the validation texts after a short run; None if it diverged."""
        settings = {"rate": rate, **self.plan.training(self.plan.sweep_steps)}

        def make() -> dict[str, Any]:
            what = f"{name}, learning rate {rate:g}"
            contender, facts = train(name, self.plan, self.texts, 0, rate, self.plan.sweep_steps, labelled(what))
            scored = None
            if not facts["diverged"]:
                scored = windowed_bits_per_byte(contender, self.texts.validation, self.texts.tokenizer)
            show(f"{what}: {scored} bits per byte\n")
            return {"rate": rate, "bits_per_byte": scored, "seconds": facts["seconds"]}

        found: float | None = self.pieces.get(f"sweep-{name}-{rate:g}", settings, make)["bits_per_byte"]
        return found

    def choice(self, name: str) -> tuple[str, float] | None:
        """The best variant of a contender and its learning rate; None if no short run has succeeded."""
        results = {v: {r: x for r, x in self.tried(v).items() if x is not None} for v in VARIANTS[name]}
        scores = [(value, variant, rate) for variant, row in results.items() for rate, value in row.items()]
        return min(scores)[1:] if scores else None

    def tried(self, name: str) -> dict[float, float | None]:
        """The sweep of a variant as far as it is known: learning rate -> bits per byte."""
        found = {}
        for path in self.folder.glob(f"sweep-{name}-*.json"):
            rate = float(path.stem.removeprefix(f"sweep-{name}-"))
            settings = {"rate": rate, **self.plan.training(self.plan.sweep_steps)}
            value = self.pieces.find(path.stem, settings)
            if value is not None:
                found[rate] = value["bits_per_byte"]
        return dict(sorted(found.items()))

    def train(self) -> None:
        """The runs that count: all contenders with the first seed, then with the next."""
        for seed in self.plan.seeds:
            for name in NAMES:
                choice = self.choice(name)
                if choice is None:
                    sys.exit(f"no learning rate is known for {name}: run the stage sweep first")
                self.run(name, seed, *choice)

    def run_settings(self, name: str, seed: int, variant: str, rate: float) -> dict[str, Any]:
        """What a run depends on."""
        other = {"variant": variant} if variant != name else {}
        return {"rate": rate, "seed": seed, **other, **self.plan.training(self.plan.steps)}

    def run(self, name: str, seed: int, variant: str, rate: float) -> None:
        """One run and its bits per byte."""
        settings = self.run_settings(name, seed, variant, rate)

        def make() -> dict[str, Any]:
            what = f"{variant}, seed {seed}"
            contender, facts = train(variant, self.plan, self.texts, seed, rate, settings["steps"], labelled(what))
            nothing = {"windows": None, "carried": None}
            facts["bits_per_byte"] = nothing if facts["diverged"] else score(contender, self.texts)
            show(f"{what}: {facts['bits_per_byte']}, {facts['seconds']:.0f} s\n")
            return {"name": name, "variant": variant, "seed": seed, "learning_rate": rate, **facts}

        self.pieces.get(f"run-{name}-{seed}", settings, make)

    def runs(self) -> list[dict[str, Any]]:
        """All finished runs, by seed and contender."""
        choices = {name: choice for name in NAMES if (choice := self.choice(name)) is not None}
        keys = [(name, seed, *choice) for seed in self.plan.seeds for name, choice in choices.items()]
        found = [self.pieces.find(f"run-{key[0]}-{key[1]}", self.run_settings(*key)) for key in keys]
        return [run for run in found if run is not None]

    # ---- measurements ----

    def speed(self) -> None:
        """Tokens per second at every length."""
        count, rounds = self.measures.tokens_per_step, self.measures.rounds
        for length in self.measures.speed_lengths:
            make = partial(speed, self.plan.size, length, count, rounds, show)
            self.pieces.get(f"speed-{length}", self.speed_settings(), make)

    def speed_settings(self) -> dict[str, Any]:
        """What these numbers depend on."""
        measures = self.measures
        return {"size": asdict(self.plan.size), "tokens": measures.tokens_per_step, "rounds": measures.rounds}

    def memory(self) -> None:
        """Training peaks, and what generation keeps."""
        for length in self.measures.training_lengths:
            for name in NAMES:
                show(f"memory of {name} at T={length}")
                make = partial(training_memory, name, length, self.measures.repeats, self.arguments)
                self.pieces.get(f"memory-{name}-{length}", self.memory_settings(), make)
        lengths, real = self.measures.kept_lengths, self.measures.cache_lengths
        settings = {**self.memory_settings(), "lengths": lengths, "real": real}
        self.pieces.get("generation", settings, lambda: generation_memory(self.plan.size, lengths, real))

    def peaks(self, name: str) -> dict[str, Any]:
        """What training steps of a contender add, by T; None where it is not measured yet."""
        lengths, settings = self.measures.training_lengths, self.memory_settings()
        return {str(length): self.pieces.find(f"memory-{name}-{length}", settings) for length in lengths}

    def memory_settings(self) -> dict[str, Any]:
        """What these numbers depend on."""
        return {"size": asdict(self.plan.size), "repeats": self.measures.repeats}

    # ---- the result ----

    def result(self) -> dict[str, Any]:
        """Everything that is finished, and what is missing."""
        measures, runs = self.measures, self.runs()
        speeds = {str(n): self.pieces.find(f"speed-{n}", self.speed_settings()) for n in measures.speed_lengths}
        peaks = {name: self.peaks(name) for name in NAMES}
        settings = {**self.memory_settings(), "lengths": measures.kept_lengths, "real": measures.cache_lengths}
        done = {(run["name"], run["seed"]) for run in runs}
        wanted = [(name, seed) for seed in self.plan.seeds for name in NAMES]
        variants = [variant for name in NAMES for variant in VARIANTS[name]]
        return {
            **circumstances(self.arguments),
            "plan": asdict(self.plan),
            "same_for_all": {"betas": BETAS, "weight_decay": WEIGHT_DECAY, "parameter_tolerance": TOLERANCE},
            "evaluation": {"window": WINDOW, "stride": STRIDE},
            "learning_rates": {name: {f"{k:g}": v for k, v in self.tried(name).items()} for name in variants},
            "missing_runs": [f"{name} seed {seed}" for name, seed in wanted if (name, seed) not in done],
            "summary": summary(runs),
            "speed": speeds if all(speeds.values()) else {},
            "training_memory": peaks if all(all(row.values()) for row in peaks.values()) else {},
            "generation_memory": self.pieces.find("generation", settings),
            "runs": runs,
        }

    def write(self) -> dict[str, Any]:
        """result.json and plot.png of everything so far."""
        result = self.result()
        with replacing([self.out / "result.json"]) as [temporary]:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        plot(result, self.out / "plot.png")
        return result


def _best(tried: dict[float, float | None]) -> float | None:
    scores = {rate: value for rate, value in tried.items() if value is not None}
    return min(scores, key=lambda rate: scores[rate]) if scores else None


def _beyond_edge(tried: dict[float, float | None]) -> float | None:
    """The next learning rate to try if the best is the smallest or the largest one."""
    best = _best(tried)
    if best is None or best == min(tried):
        return min(tried) / 2
    return 2 * best if best == max(tried) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=list(PLANS), default="long", help="quick: results go to --runs, not here")
    parser.add_argument("--runs", type=Path, default=None, help="folder of finished pieces")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="all by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan, measures = PLANS[options.plan], QUICK_MEASURES if options.plan == "quick" else Measures()
    if options.peak:
        training_peak(options.peak[0], plan.size, int(options.peak[1]))
        return
    build(LLAMA, plan.size, 0)  # if transformers is missing, say so now
    folder = options.runs or Path("runs") / f"architecture_comparison_{options.plan}"
    out = {"long": HERE, "short": HERE / "short", "quick": folder}[options.plan]
    out.mkdir(parents=True, exist_ok=True)
    arguments = ["--plan", options.plan] * (options.plan != "long")
    arguments += ["--threads", str(options.threads)] * (options.threads != 1)
    experiment = Experiment(plan, measures, folder, out, arguments)
    try:
        for stage in STAGES:
            if stage in options.stages:
                getattr(experiment, stage)()
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished is in {folder}, and the same command goes on from there")
        sys.exit(130)
    print("\n" + table(experiment.write()))


if __name__ == "__main__":
    main()
