"""A small model with a tuned state against a larger one, on string transforms that nothing in the input names.

python experiments/state_tuning/run.py            # about 10 minutes on one core
python experiments/state_tuning/run.py --quick    # a few steps of everything, under 2 minutes

Every finished run stays in --runs; a second start, also after Ctrl-C, goes on from there. Several processes can share
the work: --stages pretrain --seeds 0, and so on. Needs "wkv[tune]".
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from contest import Contender, Contest, table
from figure import plot
from learning import ATTENTION, PLAN, Plan

from wkv.files import replacing
from wkv.speed.evidence import evidence

HERE = Path(__file__).resolve().parent
STAGES = ("pretrain", "untuned", "sweep", "tune")
KINDS = ("small", "large")
CONTENDERS = {
    "state": Contender("small", "state", {}),
    "fullstate": Contender("small", "fullstate", {}),
    "lora": Contender("small", "lora", {"rank": 2, "targets": ATTENTION}),  # as many values as "state"
    "large-lora": Contender("large", "lora", {"rank": 2, "targets": ATTENTION}, (512,)),
}
QUICK = replace(
    PLAN, small=replace(PLAN.small, steps=20), large=replace(PLAN.large, steps=20), steps=5, samples=(64,),
    transforms=("reverse",), swept=("reverse",), seeds=(0,), rates=(1e-1,), ladder=(1e-1,), scored=20,
)  # fmt: skip


def stages(contest: Contest, wanted: list[str], names: list[str], seeds: list[int]) -> None:
    """Make what is missing."""
    kinds = [kind for kind in KINDS if kind in {contest.contenders[name].size for name in names}]
    if "pretrain" in wanted:
        for seed in seeds:
            for kind in kinds:
                contest.model(kind, seed)
    if "untuned" in wanted:
        for seed in seeds:
            for kind in kinds:
                for name in contest.plan.transforms:
                    contest.untuned(kind, seed, name)
    if "sweep" in wanted:
        contest.sweep(names)
    if "tune" in wanted:
        contest.tune(names, seeds)


def result(contest: Contest, arguments: list[str]) -> dict[str, Any]:
    """Everything that is finished."""
    plan = contest.plan
    return {
        **evidence(HERE / "run.py", arguments, ("torch", "numpy", "peft")),
        "plan": asdict(plan),
        "contenders": {name: contender._asdict() for name, contender in contest.contenders.items()},
        "pretraining": {kind: {s: contest.pretrained(kind, s) for s in plan.seeds} for kind in KINDS},
        "untuned": {kind: found for kind in KINDS if (found := untuned(contest, kind))},
        "learning_rates": {
            name: {str(n): {f"{r:g}": s for r, s in contest.tried(name, n).items()} for n in contest.samples(name)}
            for name in contest.contenders
        },
        "tuned": {
            name: {str(n): found for n in contest.samples(name) if (found := contest.tuned(name, n))}
            for name in contest.contenders
        },
    }


def untuned(contest: Contest, kind: str) -> dict[str, Any]:
    """How it is asked -> accuracies of a model as it is, where they are known for all seeds and transforms."""
    plan = contest.plan
    found = {s: {n: contest.untuned(kind, s, n, make=False) for n in plan.transforms} for s in plan.seeds}
    if any(row is None for own in found.values() for row in own.values()):
        return {}
    return {
        how: table({seed: {name: row[how] for name, row in own.items() if row} for seed, own in found.items()})
        for how in ("alone", "examples", "instruction")
    }


def shown(found: dict[str, Any]) -> str:
    """Accuracies in a few lines."""
    lines = []
    for kind, ways in found["untuned"].items():
        lines += [f"{kind + ', ' + how:28}{_cells(row)}" for how, row in ways.items()]
    for name, sizes in found["tuned"].items():
        for count, row in sizes.items():
            label = f"{name}, {count} ({row['parameters']} at {row['rate']:g})"
            lines.append(f"{label:28}{_cells(row)}")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> str:
    own = "  ".join(f"{name} {found['mean']:.3f}" for name, found in row["transforms"].items())
    mean = row["accuracy"]
    return f"{mean['mean']:.3f} ± {mean['deviation'] or 0:.3f}  {own}"


def write(found: dict[str, Any], out: Path) -> None:
    """result.json and plot.png."""
    with replacing([out / "result.json"]) as [temporary]:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    plot(found, out / "plot.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps; results go to --runs, not here")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=None)
    parser.add_argument("--runs", type=Path, default=None, help="folder of finished pieces")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plan: Plan = QUICK if options.quick else PLAN
    folder = options.runs or Path("runs") / f"state_tuning{'_quick' * options.quick}"
    contest = Contest(plan, CONTENDERS, folder)
    try:
        stages(contest, options.stages, options.contenders, options.seeds or list(plan.seeds))
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished is in {folder}, and the same command goes on from there")
        sys.exit(130)
    found = result(contest, ["--quick"] * options.quick)
    write(found, folder if options.quick else HERE)
    print(shown(found))


if __name__ == "__main__":
    main()
