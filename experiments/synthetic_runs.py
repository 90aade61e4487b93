"""What experiments on synthetic tasks share: studies, their command line, and the files they leave."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from wkv.evaluation.synthetic.comparison import Run, Watch, compare, write_json
from wkv.evaluation.synthetic.contenders import Contender
from wkv.evaluation.synthetic.plan import Changes
from wkv.evaluation.synthetic.plot import plot
from wkv.evaluation.synthetic.report import markdown
from wkv.speed.evidence import evidence

Draw = Callable[[dict[str, Any], Path], None]


@dataclass(frozen=True)
class Study:
    """One comparison of mixers on one task.

    Args:
        folder: of the experiment.
        task, options: what is learnt.
        model: sizes for contenders that name none.
        frame: what is changed around the mixers.
        train: budget and optimiser.
        learning_rates: to choose from, by validation accuracy over all seeds.
        contenders: as text, see `Contender.parse`.
        lengths: to test at; empty: that of the task.
        seeds: of initial values and samples.
    """

    folder: Path
    task: str
    options: Mapping[str, Any]
    model: Mapping[str, Any]
    frame: Mapping[str, Any]
    train: Mapping[str, Any]
    learning_rates: Sequence[float]
    contenders: Sequence[str]
    lengths: Sequence[int] = ()
    seeds: Sequence[int] = field(default=(0, 1, 2))

    def quick(self) -> Study:
        """A few steps of everything."""
        train = {**self.train, "steps": 8, "eval_every": 8, "validation_samples": 32, "test_samples": 32}
        return replace(self, train=train, seeds=(0,), learning_rates=self.learning_rates[:1])

    def run(self, contenders: Sequence[Contender], seeds: Sequence[int], runs: Path) -> dict[str, Any]:
        """Train what is not trained yet, and return the result over these contenders and seeds."""
        sized = [replace(one, options={**self.sizes(one), **one.options}) for one in contenders]
        changes = Changes(
            task=self.options, frame=self.frame, train=self.train, learning_rates=self.learning_rates, widths=(),
            lengths=self.lengths or None,
        )  # fmt: skip
        return compare(self.task, sized, "quick", changes, seeds, runs, watch=Lines())

    def sizes(self, contender: Contender) -> dict[str, Any]:
        """The study's sizes that this model has."""
        from wkv.evaluation.synthetic.contenders import fields

        return {key: value for key, value in self.model.items() if key in fields(contender.model)}


class Lines(Watch):
    """One line for every finished run."""

    def finished(self, run: Run, row: dict[str, Any], known: bool) -> None:
        """The accuracy of every test."""
        found = "  ".join(f"{test['label']}: {test['accuracy']:.3f}" for test in row["tests"])
        print(f"{run.name}  {found}  ({row['steps']} steps, {row['seconds']:.0f} s{', known' * known})", flush=True)


def main(studies: Study | Sequence[Study], about: str | None, draw: Draw = plot) -> None:
    """The command line of an experiment; `draw` makes the picture of a result."""
    studies = [studies] if isinstance(studies, Study) else list(studies)
    folder = studies[0].folder
    labels = list(dict.fromkeys(Contender.parse(text).label for study in studies for text in study.contenders))
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps; results go to --runs, not here")
    parser.add_argument("--tasks", nargs="+", choices=[study.task for study in studies], default=None)
    parser.add_argument("--contenders", nargs="+", choices=labels, default=None, help="train these, write no result")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="train these, write no result")
    parser.add_argument("--runs", type=Path, default=None, help="folder of finished runs")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = options.runs or Path("runs") / f"{folder.name}{'_quick' * options.quick}"
    part = options.tasks or options.contenders or options.seeds
    try:
        for study in studies:
            if options.tasks and study.task not in options.tasks:
                continue
            place = None if part else folder
            _run(study.quick() if options.quick else study, options, runs, place, len(studies) > 1, draw)
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished is in {runs}, and the same command goes on from there")
        sys.exit(130)


def _run(study: Study, options: argparse.Namespace, runs: Path, folder: Path | None, several: bool, draw: Draw) -> None:
    """Train, print, and write the files of the experiment if everything was run."""
    contenders = [Contender.parse(text) for text in study.contenders]
    chosen = [one for one in contenders if not options.contenders or one.label in options.contenders]
    found = study.run(chosen, options.seeds or study.seeds, runs / study.task)
    print(markdown(found), flush=True)
    if folder is None:
        return
    place = runs if options.quick else folder
    ending = f"_{study.task}" if several else ""
    books = evidence(folder / "run.py", ["--quick"] * options.quick, ("torch", "numpy"))
    write_json(place / f"result{ending}.json", {**books, **found, "runs": [_short(row) for row in found["runs"]]})
    draw(found, place / f"plot{ending}.png")


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """A run without what is the same for all."""
    left_out = ("evidence", "format", "task", "case", "train_parts", "test_parts", "chance", "frame", "validation")
    curve = [{key: round(value, 4) for key, value in point.items()} for point in row["curve"]]
    return {**{key: value for key, value in row.items() if key not in left_out}, "curve": curve}
