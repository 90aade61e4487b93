"""What a training run shows in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from wkv.training.checkpoint import Position


class Display:
    """A progress bar with loss, speed and time left, and one line per evaluation. Use as a context manager.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("training"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[status]}"),
            console=console, refresh_per_second=4, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("training", total=1.0, status="")
        self._start: tuple[float, float] | None = None
        self._shown = 0.0

    def step(self, fraction: float, position: Position, tokens: int, loss: float) -> None:
        """After every step. `fraction` is the part of the budget used up, `tokens` those read so far."""
        now = time.monotonic()
        if now - self._shown < 0.2 and fraction < 1:
            return
        self._shown = now
        left = position.seconds / fraction - position.seconds if fraction else 0.0
        status = f"loss {loss:.3f}  {tokens / position.seconds:,.0f} tokens/s  {duration(left)} left"
        self._progress.update(self._task, completed=fraction, status=status)

    def evaluation(self, position: Position, tokens: int, loss: float, bits_per_byte: float) -> None:
        """After every evaluation."""
        self.console.print(
            f"step {position.step:>6,}  {tokens:>11,} tokens  {duration(position.seconds):>8}  "
            f"loss {loss:.3f}  held-out {bits_per_byte:.3f} bits per byte",
            highlight=False,
        )

    def note(self, text: str) -> None:
        """One line about something unusual."""
        self.console.print(text, highlight=False, markup=False)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


@contextmanager
def reading(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar while a corpus is tokenised; the block gets what `wkv.data.build_cache` calls with documents and tokens.

    How much there is to come is not known: a stream tells at its end.
    """
    columns = TextColumn("tokenising"), BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn()
    hidden = not console.is_interactive  # a bar that nobody sees would leave an empty line
    with Progress(*columns, console=console, refresh_per_second=4, transient=True, disable=hidden) as bar:
        task = bar.add_task("tokenising", total=None, status="reading the training text")

        def progress(documents: int, tokens: int) -> None:
            bar.update(task, status=f"{documents:,} documents, {tokens:,} tokens")

        yield progress


def duration(seconds: float) -> str:
    """Seconds as 12 s, 3:05 or 2:03:04."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
