"""`wkv bench`: how fast models run on this CPU, beside other programs and beside what the memory allows."""

from __future__ import annotations

import shlex
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from wkv.speed.contenders import Contender
    from wkv.speed.files import Weights
    from wkv.speed.rounds import Settings, Watch


def bench(
    model: Annotated[Path | None, typer.Argument(help="An RWKV-7 checkpoint; without it random weights.")] = None,
    shape: Annotated[
        str, typer.Option(help="Sizes of the random weights: 0.1b, 0.4b, tiny, or several with commas between.")
    ] = "0.1b",
    peers: Annotated[str, typer.Option(help="auto (those installed), none, or some of llama.cpp,rwkv.")] = "auto",
    threads: Annotated[str, typer.Option(help="Numbers of threads, with commas between.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="How often every contender has its turn.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Two short rounds, to see that it works.")] = False,
    out: Annotated[Path, typer.Option(help="JSON to write; a PNG and Markdown tables go beside it.")] = Path(
        "bench.json"
    ),
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps the weights for the next time; else a temporary one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random weights and tokens.")] = 0,
    native: Annotated[Path | None, typer.Option(hidden=True, help="Another build of the native library.")] = None,
) -> None:
    """Measure decoding and prefill in fp32, bf16, int8 and int4, in turns with the `rwkv` package and llama.cpp.

    Every contender runs in a process of its own. Ctrl-C keeps what was measured.
    """
    from rich.console import Console

    from wkv.speed.contenders import chosen

    console = Console(soft_wrap=True)
    check_native(native)
    settings = make_settings(threads, rounds, quick, seed, native)
    contenders, skipped = chosen(peers)
    for name, reason in skipped.items():
        console.print(f"{name}: skipped, {reason}", highlight=False, markup=False)
    check_out(out)
    facts = {"command": shlex.join(["wkv", *sys.argv[1:]]), "skipped": skipped}
    with ExitStack() as stack:
        folder = cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wkv-bench-")))
        models = find_models(model, shape, folder, seed)
        result = run(console, models, contenders, settings, out, facts)
    show(console, result)
    draw(console, result, out)
    if not result["complete"]:
        raise typer.Exit(130)


def check_native(path: Path | None) -> None:
    """Refuse early where there are no native kernels to measure."""
    from wkv import native
    from wkv.errors import WkvError

    if path is not None:
        native.load(path)
    reason = native.unavailable()
    if reason is not None:
        raise WkvError(f"wkv bench measures the native kernels, which are not available: {reason}")


def check_out(out: Path) -> None:
    """Refuse a result file that cannot be written, before anything long begins."""
    from wkv.errors import WkvError

    if out.suffix != ".json":
        raise WkvError(f"{out}: the result is JSON; give a name that ends in .json")
    if not out.parent.is_dir():
        raise WkvError(f"{out}: the folder {out.parent} does not exist")


def make_settings(threads: str, rounds: int, quick: bool, seed: int, native: Path | None) -> Settings:
    """Settings from the command line.

    Raises:
        WkvError: if `threads` is no list of positive numbers.
    """
    from dataclasses import replace

    from wkv.errors import WkvError
    from wkv.speed.rounds import QUICK, Settings

    words = [word.strip() for word in threads.split(",")]
    if not all(word.isdecimal() and 0 < int(word) <= 1024 for word in words):
        raise WkvError(f"--threads is a list such as 1,2; found {threads!r}")
    counts = tuple(dict.fromkeys(int(word) for word in words))
    settings = Settings(counts, rounds, seed=seed, native=str(native) if native else None)
    return replace(settings, **QUICK) if quick else settings  # type: ignore[arg-type]


def find_models(model: Path | None, shapes: str, folder: Path, seed: int) -> dict[str, Weights]:
    """The user's model, or random ones."""
    from wkv.speed.files import model_weights, shape_weights

    if model is not None:
        return {model.name: model_weights(model, folder)}
    names = list(dict.fromkeys(name.strip().lower() for name in shapes.split(",")))
    return {name: shape_weights(name, folder, seed) for name in names}


def run(
    console: Console,
    models: dict[str, Weights],
    contenders: Sequence[Contender],
    settings: Settings,
    out: Path,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Measure with a progress bar; the result is written after every round."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from wkv.speed import bench as benchmark
    from wkv.speed.rounds import Watch

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(models) * len(contenders) * settings.turns)
        watch: Watch = Watch(
            said=lambda text: progress.update(task, description=text), turned=lambda: progress.advance(task)
        )
        return benchmark.run(
            models, contenders, settings, watch, lambda result: benchmark.write_files(result, out), facts
        )


def show(console: Console, result: dict[str, Any]) -> None:
    """Print the tables, and who failed."""
    from rich.table import Table

    from wkv.speed.report import COLUMNS, contender_rows, pair_rows

    for name, shape in result["shapes"].items():
        for failed, reason in shape["failed"].items():
            console.print(f"{failed}: failed, {reason}", highlight=False, markup=False)
        for threads, found in shape["threads"].items():
            title = f"{name}, {threads} thread{'s' * (threads != '1')}"
            speeds = Table("", *COLUMNS, title=title)
            for cells in contender_rows(found):
                speeds.add_row(*cells)
            console.print(speeds)
            ratios = Table("ours", "peer", "", "times faster", "range", "target")
            for cells in pair_rows(found):
                ratios.add_row(*cells)
            console.print(ratios)


def draw(console: Console, result: dict[str, Any], out: Path) -> None:
    """Write the picture, or say why not."""
    from wkv.errors import WkvError
    from wkv.speed.plot import plot

    written = [out, out.with_suffix(".md")]
    try:
        plot(result, out.with_suffix(".png"))
        written.append(out.with_suffix(".png"))
    except WkvError as error:
        console.print(str(error), highlight=False, markup=False)
    console.print("written: " + ", ".join(map(str, written)), highlight=False, markup=False)
    if not result["complete"]:
        console.print("not complete: the numbers above are those measured so far", highlight=False)
