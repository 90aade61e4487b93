"""What is made of finished runs: the chosen learning rate of every contender, means over seeds, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev
from typing import Any

from wkv.evaluation.synthetic.scoring import METRIC

Row = dict[str, Any]
SCORES = ("accuracy", "sequence_accuracy", "last_accuracy")
COLUMNS = ("accuracy", "sequences", "last", "state bytes", "parameters", "rate", "steps", "seconds", "steps/s", "seeds")
SHORT = (0, 1, 2, 3, 6, 7)  # columns for a terminal


def summary(rows: Sequence[Row]) -> Row:
    """The result of a comparison.

    Args:
        rows: what `comparison.train_run` returned, in any order, of one task.

    Returns:
        `task`, `chance`, `score` (what "accuracy" of an entry is taken over), `cases` (each with a `label` and
        `entries`, one per contender and width) and the `runs` themselves.
    """
    cases = []
    for label, of_case in _groups(rows, lambda row: row["case"]):
        entries = [_entry(group) for _, group in _groups(of_case, lambda row: (row["contender"], row["width"]))]
        cases.append({"label": label, "entries": entries})
    first = rows[0]
    return {
        "task": first["task"],
        "chance": first["chance"],
        "score": _score(first["tests"], _by_length(first)),
        "by_length": _by_length(first),
        "cases": cases,
        "runs": list(rows),
    }


def _groups(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    """Rows of one key together, in the order in which keys first come."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.items())


def _by_length(row: Row) -> bool:
    """Whether the tests are the task at several lengths."""
    return len(row["tests"]) > 1 and all(part["length"] for part in row["test_parts"])


def _score(tests: Sequence[Row], by_length: bool) -> str:
    if len(tests) == 1:
        return f"test samples of length {tests[0]['length']}"
    return (
        f"test samples of length {tests[0]['length']}" if by_length else f"mean of {len(tests)} kinds of test samples"
    )


def _entry(rows: Sequence[Row]) -> Row:
    """One contender at one width: the learning rate that is best on the validation samples, means over its seeds."""
    rates = {rate: group for rate, group in _groups(rows, lambda row: row["settings"]["learning_rate"])}
    by_rate = {rate: mean(row["validation"]["accuracy"] for row in group) for rate, group in rates.items()}
    losses = {rate: mean(row["validation"]["loss"] for row in group) for rate, group in rates.items()}
    chosen = max(by_rate, key=lambda rate: (by_rate[rate], -losses[rate]))
    best, first = rates[chosen], rates[chosen][0]
    tests = [_test([row["tests"][place] for row in best]) for place in range(len(first["tests"]))]
    counted = 1 if _by_length(first) else len(tests)
    values = {name: [mean(test[name] for test in row["tests"][:counted]) for row in best] for name in SCORES}
    return {
        "contender": first["contender"],
        **{name: first[name] for name in ("model", "options", "width", "parameters", "state_bytes")},
        "learning_rate": chosen,
        "validation_accuracy_by_rate": {f"{rate:g}": value for rate, value in by_rate.items()},
        "seeds": [row["seed"] for row in best],
        **{name: _spread(found) for name, found in values.items()},
        "steps": mean(row["steps"] for row in best),
        "seconds": mean(row["seconds"] for row in best),
        "stopped_early": sum(row["stopped_early"] for row in best),
        "tests": tests,
    }


def _test(found: Sequence[Row]) -> Row:
    """One test of all seeds."""
    same = {name: found[0][name] for name in ("label", "length", "state_bytes")}
    return {**same, **{name: _spread([row[name] for row in found]) for name in SCORES}}


def _spread(values: Sequence[float]) -> Row:
    return {"mean": mean(values), "deviation": stdev(values) if len(values) > 1 else None, "values": list(values)}


def markdown(result: Row) -> str:
    """The result as a page: one table of contenders per case, and one of accuracies where there are several tests."""
    lines = [f"# {result['task']}", "", *notes(result)]
    for case in result["cases"]:
        if case["label"]:
            lines += ["", f"## {case['label']}"]
        lines += ["", *_table(("contender", *COLUMNS), contender_rows(case))]
        if len(case["entries"][0]["tests"]) > 1:
            lines += ["", "Accuracy by test:", "", *_table(test_columns(case), test_rows(case))]
    return "\n".join(lines) + "\n"


def notes(result: Row) -> list[str]:
    """What the numbers of the tables are."""
    return [
        f"Accuracy: {METRIC}; {result['score']}. A blind guess reaches {result['chance']:.3f}. State bytes: all "
        "layers, one sequence of the training length, four bytes a number. Seconds: training alone. Means over seeds, "
        "with the standard deviation; the learning rate is the best on validation samples.",
    ]


def contender_rows(case: Row) -> list[list[str]]:
    """Cells: the contender, then `COLUMNS`."""
    return [
        [
            entry_name(entry),
            *(_written(entry[name]) for name in SCORES),
            f"{entry['state_bytes']:,}",
            f"{entry['parameters']:,}",
            f"{entry['learning_rate']:g}",
            f"{entry['steps']:,.0f}",
            f"{entry['seconds']:,.1f}",
            f"{entry['steps'] / max(entry['seconds'], 1e-9):,.1f}",
            str(len(entry["seeds"])),
        ]
        for entry in case["entries"]
    ]


def short_columns() -> list[str]:
    """Heads of `short_rows`."""
    return ["contender", *(COLUMNS[place] for place in SHORT)]


def short_rows(case: Row) -> list[list[str]]:
    """Cells that fit a terminal, the accuracy alone with its deviation."""
    rows = []
    for name, *cells in contender_rows(case):
        first, *others = (cells[place] for place in SHORT)
        rows.append([name, first, *(cell.split(" ")[0] for cell in others)])
    return rows


def test_columns(case: Row) -> list[str]:
    """Heads of `test_rows`."""
    return ["contender", *(test["label"] for test in case["entries"][0]["tests"])]


def test_rows(case: Row) -> list[list[str]]:
    """Cells: the contender, then its accuracy in every test."""
    return [[entry_name(entry), *(_written(test["accuracy"]) for test in entry["tests"])] for entry in case["entries"]]


def entry_name(entry: Row) -> str:
    """The contender, with its width where the case gives it one."""
    return entry["contender"] if entry["width"] is None else f"{entry['contender']}, d={entry['width']}"


def _written(score: Row) -> str:
    spread = "" if score["deviation"] is None else f" ± {score['deviation']:.3f}"
    return f"{score['mean']:.3f}{spread}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return head + [f"| {' | '.join(cells)} |" for cells in rows]
