"""The log of a training run: log.csv, and the loss curve drawn from it."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from wkv.errors import CheckpointError
from wkv.training.checkpoint import write_file

COLUMNS = ("step", "tokens", "seconds", "loss", "learning_rate", "gradient_norm", "bits_per_byte", "skipped")
WHOLE = ("step", "tokens", "skipped")
BLUE, ORANGE = "#1f4e8c", "#d1622b"
Row = dict[str, float]


class RunLog:
    """log.csv: one row per training step, and one per evaluation (`bits_per_byte` filled, `loss` empty).

    `step` counts finished steps, `seconds` the time spent in them, `tokens` what they read. `skipped` is 1 for a step
    that left the model as it was. Use as a context manager.

    Args:
        path: the file.
        last_step: rows of later steps are dropped: the run goes on from there.
    """

    def __init__(self, path: Path, last_step: int = 0) -> None:
        kept = [row for row in read_log(path) if row["step"] <= last_step] if path.exists() and last_step else []
        write_file(path, lambda temporary: _write_rows(temporary, kept))
        self._path = path
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def add(self, **values: float) -> None:
        """Append a row; columns that are not given stay empty."""
        with self._errors():
            self._writer.writerow(_formatted(values))

    def flush(self) -> None:
        """Bring all rows to the file."""
        with self._errors():
            self._file.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._errors():
                self._file.close()
        else:  # a full disk must not hide what went wrong first
            with suppress(OSError):
                self._file.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be written: {error.strerror or error}") from error


class SilentLog:
    """In place of a `RunLog` on processes that write none."""

    def add(self, **values: float) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def read_log(path: Path) -> list[Row]:
    """The rows of a log.csv; empty columns are missing keys, and a last line that was cut off is left out."""
    rows = []
    with path.open(newline="") as file:
        for raw in csv.DictReader(file):
            if None in raw.values() or None in raw:
                continue
            rows.append({key: float(value) for key, value in raw.items() if value})
    return rows


def draw_loss_curve(log: Path, image: Path) -> None:
    """Draw training loss (every step, and smoothed) and held-out bits per byte over training tokens, as a PNG."""
    from matplotlib.figure import Figure

    rows = read_log(log)
    steps = [row for row in rows if "loss" in row and "skipped" not in row]
    evaluations = [row for row in rows if "bits_per_byte" in row]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    left = figure.add_subplot()
    tokens, losses = [row["tokens"] for row in steps], [row["loss"] for row in steps]
    left.plot(tokens, losses, color=BLUE, linewidth=0.5, alpha=0.3)
    left.plot(tokens, _smoothed(losses), color=BLUE, linewidth=1.8)
    _label(left, "training loss, nats per token", BLUE)
    if evaluations:
        right = left.twinx()
        scores = [row["bits_per_byte"] for row in evaluations]
        right.plot([row["tokens"] for row in evaluations], scores, color=ORANGE, marker="o", markersize=4)
        _label(right, "held-out bits per byte", ORANGE)
    left.set_xlabel("training tokens")
    left.grid(alpha=0.25, linewidth=0.6)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    write_file(image, lambda path: figure.savefig(path, format="png"))


def _label(axes: Any, text: str, color: str) -> None:
    axes.set_ylabel(text, color=color)
    axes.tick_params(axis="y", colors=color)
    axes.spines["top"].set_visible(False)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of about a thirtieth of the curve, narrower towards its ends."""
    sums = [0.0, *itertools.accumulate(values)]
    reach, last = len(values) // 60, len(values) - 1
    out = []
    for i in range(len(values)):
        near = min(reach, i, last - i)
        out.append((sums[i + near + 1] - sums[i - near]) / (2 * near + 1))
    return out


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(_formatted(row) for row in rows)


def _formatted(row: Row) -> dict[str, Any]:
    """Whole numbers as such, the rest with the nine digits that a float32 needs to be read back exactly."""
    return {key: int(value) if key in WHOLE else f"{value:.9g}" for key, value in row.items()}
