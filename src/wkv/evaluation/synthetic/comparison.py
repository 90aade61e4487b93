"""Compare mixers: every contender at every width, learning rate and seed, one file per finished run.

A comparison that is interrupted goes on where it stopped: finished runs are read from their files, the run in progress
starts anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wkv.errors import WkvError
from wkv.evaluation.synthetic.contenders import Contender, state_bytes
from wkv.evaluation.synthetic.plan import Case, Changes, make_cases
from wkv.evaluation.synthetic.report import summary
from wkv.evaluation.synthetic.scoring import METRIC, Scores
from wkv.evaluation.synthetic.streams import MAX_SEED, sample_length
from wkv.evaluation.synthetic.trainer import train
from wkv.files import replacing

FORMAT = 1
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        case: what is learnt.
        contender: who learns.
        learning_rate, seed: its own.
        width: hidden size given by the case, or None.
    """

    case: Case
    contender: Contender
    learning_rate: float
    seed: int
    width: int | None = None

    @property
    def name(self) -> str:
        """To read: contender, case, width, learning rate, seed."""
        width = "" if self.width is None else f"d={self.width}"
        words = (self.contender.label, self.case.label, width, f"lr={self.learning_rate:g}", f"seed={self.seed}")
        return " ".join(filter(None, words))

    def description(self) -> Row:
        """Everything that decides the outcome, as JSON values."""
        sizes = {**self.case.model, **({} if self.width is None else {"hidden_size": self.width})}
        settings = dataclasses.replace(self.case.settings, learning_rate=self.learning_rate)
        text = json.dumps(
            {
                "format": FORMAT,
                "task": self.case.parts[0].task.name,
                "case": self.case.label,
                "train_parts": [_described(part) for part in self.case.parts],
                "test_parts": [_described(part) for part in self.case.tests],
                "chance": self.case.parts[0].task.chance,
                "contender": self.contender.label,
                "model": self.contender.model,
                "options": self.contender.all_options(self.case.vocab_size, sizes),
                "width": self.width,
                "frame": dataclasses.asdict(self.case.frame),
                "settings": dataclasses.asdict(settings),
                "seed": self.seed,
            }
        )
        found: Row = json.loads(text)
        return found


class Watch:
    """What is told of the progress; the default says nothing."""

    def started(self, run: Run, place: int, total: int) -> None:
        """A run begins: number `place` (from 1) of `total`."""

    def stepped(self, step: int, steps: int, loss: float, scores: Scores | None) -> None:
        """A step was made; `scores` where the model was evaluated after it."""

    def finished(self, run: Run, row: Row, known: bool) -> None:
        """A run is over, or was `known` from its file."""


def compare(
    task: str,
    contenders: Sequence[Contender | str],
    preset: str = "default",
    changes: Changes | None = None,
    seeds: Sequence[int] = (0,),
    out: Path | str | None = None,
    device: str = "cpu",
    watch: Watch | None = None,
) -> Row:
    """Train and test all contenders on one task.

    Args:
        task: its name.
        contenders: or their text, see `Contender.parse`.
        preset, changes: see `plan.make_cases`.
        seeds: of initial values and samples.
        out: folder for one JSON file per run and for `result.json`; None keeps nothing.
        device: where to train.
        watch: told of the progress.

    Returns:
        the result, see `report.summary`, with the hardware, the versions and the commit where it was made.

    Raises:
        WkvError: for anything that does not fit together, before the first step is made.
    """
    chosen = [Contender.parse(one) if isinstance(one, str) else one for one in contenders]
    check_device(device)
    runs = plan_runs(make_cases(task, preset, changes), chosen, seeds)
    folder = None if out is None else _made(Path(out))
    watch = watch or Watch()
    rows = []
    for place, run in enumerate(runs, 1):
        path = None if folder is None else folder / "runs" / file_name(run)
        row = None if path is None else read_run(path, run)
        known = row is not None
        if row is None:
            watch.started(run, place, len(runs))
            row = train_run(run, device, watch)
            if path is not None:
                write_json(path, row)
        rows.append(row)
        watch.finished(run, row, known)
    result = {"preset": preset, "metric": METRIC, **summary(rows)}
    if folder is not None:
        write_json(folder / "result.json", result)
    return result


def check_device(device: str) -> None:
    """Raise `WkvError` unless tensors can be made there."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise WkvError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def plan_runs(cases: Sequence[Case], contenders: Sequence[Contender], seeds: Sequence[int]) -> list[Run]:
    """All runs, checked; those of one contender and seed lie apart, so that an interrupted comparison has every one."""
    labels = [contender.label for contender in contenders]
    if not labels or len(set(labels)) < len(labels):
        raise WkvError(f"a comparison needs contenders with different labels, found {labels}")
    if not seeds or not all(0 <= seed <= MAX_SEED for seed in seeds):
        raise WkvError(f"seeds must lie between 0 and {MAX_SEED}, found {list(seeds)}")
    runs = [
        Run(case, contender, rate, seed, width)
        for seed in dict.fromkeys(seeds)
        for case in cases
        for contender in contenders
        for width in ([None] if "hidden_size" in contender.options or not case.widths else case.widths)
        for rate in case.learning_rates
    ]
    for run in runs:
        run.description()
    return runs


def train_run(run: Run, device: str = "cpu", watch: Watch | None = None) -> Row:
    """One run, from the initial values to the tests. The global random numbers are left as they were."""
    described = run.description()
    sizes = {**run.case.model, **({} if run.width is None else {"hidden_size": run.width})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = run.contender.build(run.case.vocab_size, sizes, run.case.frame).to(device)
    settings = dataclasses.replace(run.case.settings, learning_rate=run.learning_rate)
    stepped = None if watch is None else watch.stepped
    outcome = train(model, run.case.parts, run.case.tests, settings, run.seed, stepped)
    return {
        **described,
        "parameters": model.num_parameters,
        "state_bytes": state_bytes(model, max(map(sample_length, run.case.parts))),
        **dataclasses.asdict(outcome),
        "evidence": _evidence(device),
    }


def _described(part: Any) -> Row:
    return {"options": part.task.options, "samples": part.samples, "length": part.length, "label": part.label}


def _evidence(device: str) -> Row:
    """Hardware, versions, and the commit if this is the repository's own copy of the library."""
    from wkv.speed.evidence import evidence

    found = evidence(__file__)
    ours = "src/wkv/" in found.pop("command")
    gpu = {"gpu": torch.cuda.get_device_name(device)} if torch.device(device).type == "cuda" else {}
    return {**found, "commit": found["commit"] if ours else None, "device": device, **gpu}


def file_name(run: Run) -> str:
    """A name to read, and a digest of everything that decides the outcome."""
    described = run.description()
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:10]
    return f"{re.sub(r'[^A-Za-z0-9.=]+', '-', run.name)}-{digest}.json"


def read_run(path: Path, run: Run) -> Row | None:
    """The finished run in a file, or None if there is no such file.

    Raises:
        WkvError: if the file is not one of ours.
    """
    if not path.is_file():
        return None
    try:
        row: Row = json.loads(path.read_text(encoding="utf-8"))
        same = {key: row.get(key) for key in run.description()} == run.description()
    except (OSError, ValueError, AttributeError) as error:
        raise WkvError(f"{path}: not a finished run ({error}); remove it to train anew") from error
    if not same:
        raise WkvError(f"{path}: a run of other settings; remove it to train anew")
    return row


def write_json(path: Path, content: Row) -> None:
    """The file appears when it is complete."""
    with replacing([path]) as [temporary]:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _made(folder: Path) -> Path:
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WkvError(f"{folder} cannot be made: {error.strerror or error}") from error
    return folder
