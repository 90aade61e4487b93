"""`wkv eval`: train small models on a synthetic task and compare what they learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from wkv.evaluation.synthetic.comparison import Run, Watch
    from wkv.evaluation.synthetic.plan import Changes
    from wkv.evaluation.synthetic.scoring import Scores


def eval(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK] [KEY=VALUE]...",
            show_default=False,
            help="TASK: see --list. KEY=VALUE: options of the task, such as pairs=8; of the training with `train.` "
            "before them, such as train.steps=2000.",
        ),
    ] = None,
    models: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Registered models with commas between; NAME:OPTION=VALUE,... sets options of one, label=TEXT what "
            "it is called.",
        ),
    ] = "rwkv4,rwkv7",
    preset: Annotated[str, typer.Option(metavar="NAME", help="Settings: default, quick, or a paper's.")] = "default",
    quick: Annotated[bool, typer.Option("--quick", help="The preset quick: a minute or two per model.")] = False,
    seeds: Annotated[str, typer.Option(help="With commas between.")] = "0",
    learning_rates: Annotated[
        str, typer.Option(help="Those to choose from. Default: the preset's.", show_default=False)
    ] = "",
    widths: Annotated[str, typer.Option(help="Hidden sizes for every model. Default: the preset's.")] = "",
    lengths: Annotated[str, typer.Option(help="Lengths to test at. Default: the preset's.")] = "",
    channel_mix: Annotated[
        bool | None,
        typer.Option("--channel-mix/--no-channel-mix", help="Without it the mixers stand alone.", show_default=False),
    ] = None,
    tied_head: Annotated[
        bool | None,
        typer.Option("--tied-head/--untied-head", help="The head is the embedding's matrix.", show_default=False),
    ] = None,
    init: Annotated[
        float | None, typer.Option(metavar="STD", help="Of the embedding. Default: the model's.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, ...")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Default: runs/eval-TASK.", show_default=False)
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List tasks, models and presets.")] = False,
) -> None:
    """Train small models on a synthetic task; compare accuracy, bytes of state and longer sequences than in training.

    [bold]wkv eval mqar --models rwkv4,rwkv7 --quick[/]        recall, two minutes
    [bold]wkv eval running_parity --models rwkv7,rwkv7:a_scale=2 --seeds 0,1,2[/]
                                                    state tracking, beyond the trained length
    [bold]wkv eval mqar pairs=8 length=64 train.steps=3000[/]  another setting

    Finished runs are kept; the same command goes on where it was stopped.
    """
    from rich.console import Console

    from wkv.errors import WkvError

    console = Console(soft_wrap=True)
    if list_all:
        return show_list(console)
    task, *words = arguments or [""]
    if not task or "=" in task:
        from wkv.evaluation.synthetic.task import list_tasks

        raise WkvError(f"wkv eval needs a task before any KEY=VALUE; one of {', '.join(list_tasks())}")
    changes = make_changes(words, learning_rates, widths, lengths, _given(channel_mix, tied_head, init))
    folder = out or Path(f"runs/eval-{task}")
    run(console, task, models, "quick" if quick else preset, changes, seeds, folder, device)
    return None


def make_changes(words: list[str], rates: str, widths: str, lengths: str, frame: dict[str, Any]) -> Changes:
    """What the command line changes in a preset.

    Raises:
        WkvError: for words that are not KEY=VALUE and for lists of something else than numbers.
    """
    from wkv.errors import WkvError
    from wkv.evaluation.synthetic.contenders import parse_value
    from wkv.evaluation.synthetic.plan import Changes

    task: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (equals and key and value):
            raise WkvError(f"expected KEY=VALUE, found {word!r}")
        table = training if key.startswith("train.") else task
        table[key.removeprefix("train.")] = parse_value(value)
    return Changes(
        task=task,
        frame=frame,
        train=training,
        learning_rates=numbers("--learning-rates", rates, float) if rates else None,
        widths=numbers("--widths", widths, int) if widths else None,
        lengths=numbers("--lengths", lengths, int) if lengths else None,
    )


def _given(channel_mix: bool | None, tied_head: bool | None, init: float | None) -> dict[str, Any]:
    frame = {"channel_mix": channel_mix, "tied_head": tied_head, "embedding_std": init}
    return {name: value for name, value in frame.items() if value is not None}


def numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """A list with commas between, without repetitions.

    Raises:
        WkvError: if there is anything else in it.
    """
    from wkv.errors import WkvError

    try:
        return list(dict.fromkeys(kind(word) for word in text.split(",")))
    except ValueError:
        raise WkvError(f"{option} is a list of numbers such as 1,2; found {text!r}") from None


def run(
    console: Console, task: str, models: str, preset: str, changes: Changes, seeds: str, out: Path, device: str
) -> None:
    """Compare with a progress bar, then print the tables and write the files; an interruption ends with status 130."""
    from wkv.evaluation.synthetic.comparison import compare
    from wkv.evaluation.synthetic.contenders import split_contenders

    contenders = split_contenders(models)
    chosen = numbers("--seeds", seeds, int)
    try:
        with progress_bars(console) as watch:
            result = compare(task, contenders, preset, changes, chosen, out, device, watch)
    except KeyboardInterrupt:
        say(console, f"stopped; finished runs are in {out}/runs, and the same command goes on")
        raise typer.Exit(130) from None
    show(console, result)
    write(console, result, out)


@contextmanager
def progress_bars(console: Console) -> Iterator[Watch]:
    """A bar for all runs and one for the run in progress; one line for every finished run."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from wkv.evaluation.synthetic.comparison import Watch

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    hidden = not console.is_interactive
    with Progress(*columns, console=console, refresh_per_second=4, transient=True, disable=hidden) as bars:
        whole, one = bars.add_task("runs", total=None), bars.add_task("", total=None)

        class Shown(Watch):
            name, accuracy = "", ""

            def started(self, run: Run, place: int, total: int) -> None:
                self.name, self.accuracy = run.name, ""
                bars.update(whole, completed=place - 1, total=total)
                bars.reset(one)

            def stepped(self, step: int, steps: int, loss: float, scores: Scores | None) -> None:
                if scores is not None:
                    self.accuracy = f"  accuracy {scores.accuracy:.3f}"
                described = f"{self.name}  loss {loss:.3f}{self.accuracy}"
                bars.update(one, completed=step, total=steps, description=described)

            def finished(self, run: Run, row: dict[str, Any], known: bool) -> None:
                bars.advance(whole)
                say(console, run_line(run, row, known))

        yield Shown()


def run_line(run: Run, row: dict[str, Any], known: bool) -> str:
    """One finished run in one line."""
    found = "  ".join(f"{test['label']}: {test['accuracy']:.3f}" for test in row["tests"])
    took = "known from an earlier start" if known else f"{row['steps']:,} steps in {row['seconds']:.0f} s"
    return f"{run.name}  {found}  ({took})"


def show(console: Console, result: dict[str, Any]) -> None:
    """Print the tables."""
    from rich.markup import escape
    from rich.table import Table

    from wkv.evaluation.synthetic.report import notes, short_columns, short_rows, test_columns, test_rows

    for case in result["cases"]:
        tables = [(short_columns(), short_rows(case))]
        if len(case["entries"][0]["tests"]) > 1:
            tables.append((test_columns(case), test_rows(case)))
        if case["label"]:
            say(console, f"\n{case['label']}")
        for columns, rows in tables:
            say(console, "")
            table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
            for cells in rows:
                table.add_row(*map(escape, cells))
            console.print(table, highlight=False)
    say(console, "\n" + " ".join(notes(result)))


def write(console: Console, result: dict[str, Any], out: Path) -> None:
    """Write the page and the picture beside `result.json`, or say why not."""
    from wkv.errors import WkvError
    from wkv.evaluation.synthetic.plot import plot
    from wkv.evaluation.synthetic.report import markdown

    (out / "report.md").write_text(markdown(result), encoding="utf-8")
    written = ["result.json", "report.md"]
    try:
        plot(result, out / "plot.png")
        written.append("plot.png")
    except WkvError as error:
        say(console, str(error))
    say(console, f"written to {out}: {', '.join(written)}")


def show_list(console: Console) -> None:
    """Tasks, models and presets."""
    from wkv.evaluation.synthetic.presets import PRESETS
    from wkv.evaluation.synthetic.task import list_tasks
    from wkv.registry import list_models

    say(console, f"tasks    {', '.join(list_tasks())}")
    say(console, f"models   {', '.join(list_models())}")
    for name, sections in PRESETS.items():
        say(console, f"preset   {name}: {'every task' if '' in sections else ', '.join(sections)}")


def say(console: Console, text: str) -> None:
    """One plain line: no colours for numbers, no markup in names."""
    console.print(text, highlight=False, markup=False)
