"""Upscaled kernel states, with and without decorrelated backpropagation, against plain states (our reconstruction).

python experiments/upscaled_state/run.py            # about 6 minutes on one core
python experiments/upscaled_state/run.py --quick    # a few steps of everything, under 2 minutes

The task and the pre-trained models are those of experiments/state_tuning. Every finished run stays in --runs; a second
start, also after Ctrl-C, goes on from there. Several processes can share the work by --contenders and --seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "state_tuning"))  # the task, the models and the books

import torch  # noqa: E402
from contest import Contender, Contest, spread  # noqa: E402
from curves import plot  # noqa: E402
from learning import PLAN, Plan  # noqa: E402

from wkv.files import replacing  # noqa: E402
from wkv.speed.evidence import evidence  # noqa: E402

N = 16  # head size of the models
RULE = {"rate": 1e-2, "kappa": 0.1, "sample": 1.0}
CONTENDERS = {
    "plain": Contender("small", "state", {}),
    "plain, rank 8": Contender("small", "state", {"rank": N // 2}),  # as many values as "plain"
    "plain, DBP": Contender("small", "state-kernel", {"support": "identity", "kernel": "linear", "dbp": RULE}),
    "kernel N": Contender("small", "state-kernel", {"size": N}),  # as many values as "plain"
    "kernel 2N": Contender("small", "state-kernel", {"size": 2 * N}),
    "kernel 4N": Contender("small", "state-kernel", {"size": 4 * N}),
    "kernel 2N, DBP": Contender("small", "state-kernel", {"size": 2 * N, "dbp": RULE}),
}
REFERENCE = "plain"
UPSCALED = replace(PLAN, samples=(512,))
QUICK = replace(
    UPSCALED, small=replace(PLAN.small, steps=20), steps=5, transforms=("reverse",), swept=("reverse",), seeds=(0,),
    rates=(1e-1,), ladder=(1e-1,), scored=20,
)  # fmt: skip
WINDOW = 10  # batches whose mean loss must reach a level
LEVELS = (0.5, 0.25)  # parts of the loss that the untuned model starts with


def steps_to(losses: list[float], start: float, part: float) -> int | None:
    """Steps until the mean of the last `WINDOW` losses is at most `part` of `start`; None if they never are."""
    for end in range(WINDOW, len(losses) + 1):
        if statistics.fmean(losses[end - WINDOW : end]) <= part * start:
            return end
    return None


def result(contest: Contest, arguments: list[str]) -> dict[str, Any]:
    """Everything that is finished."""
    plan, count = contest.plan, contest.plan.samples[0]
    tuned = {name: found for name in contest.contenders if (found := contest.tuned(name, count))}
    return {
        **evidence(HERE / "run.py", arguments, ("torch", "numpy")),
        "plan": asdict(plan),
        "contenders": {name: contender._asdict() for name, contender in contest.contenders.items()},
        "learning_rates": {
            name: {f"{rate:g}": row for rate, row in contest.tried(name, count).items()} for name in contest.contenders
        },
        "tuned": {name: compared(found, tuned, plan) for name, found in tuned.items()},
    }


def compared(found: dict[str, Any], tuned: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """A contender with paired differences to the plain state, test losses and steps to each of `LEVELS`."""
    row = {**found, "test_loss": spread(_losses(found))}
    if REFERENCE in tuned and found is not tuned[REFERENCE]:
        reference = tuned[REFERENCE]
        pairs = zip(found["accuracy"]["all"], reference["accuracy"]["all"], strict=True)
        row["accuracy_to_plain"] = spread([own - other for own, other in pairs])
        row["loss_to_plain"] = spread([a - b for a, b in zip(_losses(found), _losses(reference), strict=True)])
    row["steps_to"] = {f"{part:g}": _steps(found, part) for part in LEVELS}
    return row


def _losses(found: dict[str, Any]) -> list[float]:
    """Of every seed the mean loss of the test strings over transforms."""
    return [statistics.fmean(run["test"]["loss"] for run in own.values()) for own in found["runs"].values()]


def _steps(found: dict[str, Any], part: float) -> dict[str, Any]:
    """Median over all runs, of which those that never get there count as infinite, and how many those are."""
    steps = [steps_to(run["losses"], run["losses"][0], part) for own in found["runs"].values() for run in own.values()]
    reached = sorted(step for step in steps if step is not None)
    middle = (len(steps) - 1) // 2  # the lower of two
    return {"median": reached[middle] if middle < len(reached) else None, "missed": len(steps) - len(reached)}


def shown(found: dict[str, Any]) -> str:
    """The comparison in a few lines."""
    lines = []
    for name, row in found["tuned"].items():
        accuracy, loss, deviation = row["accuracy"], row["test_loss"], row["accuracy"]["deviation"] or 0
        to_plain = f", to plain {row['accuracy_to_plain']['all']}" if "accuracy_to_plain" in row else ""
        lines.append(
            f"{name:16}{row['parameters']:>6} at {row['rate']:<5g} {accuracy['mean']:.3f} ± {deviation:.3f}{to_plain}, "
            f"loss {loss['mean']:.4f} ± {loss['deviation'] or 0:.4f}, steps {row['steps_to']}"
        )
    return "\n".join(lines)


def write(found: dict[str, Any], out: Path) -> None:
    """result.json and plot.png."""
    with replacing([out / "result.json"]) as [temporary]:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    plot(found, out / "plot.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps; results go to --runs, not here")
    parser.add_argument("--stages", nargs="+", choices=("sweep", "tune"), default=["sweep", "tune"])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=None)
    parser.add_argument("--runs", type=Path, default=None, help="folder of finished pieces")
    parser.add_argument("--models", type=Path, default=None, help="folder of pre-trained models")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quick = "_quick" * options.quick
    folder = options.runs or Path("runs") / f"upscaled_state{quick}"
    models = options.models or Path("runs") / f"state_tuning{quick}"
    contest = Contest(QUICK if options.quick else UPSCALED, CONTENDERS, folder, models)
    try:
        if "sweep" in options.stages:
            contest.sweep(options.contenders)
        if "tune" in options.stages:
            contest.tune(options.contenders, options.seeds or list(contest.plan.seeds))
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished is in {folder}, and the same command goes on from there")
        sys.exit(130)
    found = result(contest, ["--quick"] * options.quick)
    write(found, folder if options.quick else HERE)
    print(shown(found))


if __name__ == "__main__":
    main()
