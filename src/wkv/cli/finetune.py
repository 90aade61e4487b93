"""`wkv finetune`: train an adapter of a checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from wkv.training import Recipe, Result


def finetune(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [KEY=VALUE]...",
            show_default=False,
            help="MODEL: the checkpoint to start from, a file or a folder of any version; `starter` (the default) is "
            "that of the package. KEY=VALUE: changes to the recipe `finetune`, such as train.context_length=512.",
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE", help="Conversations or rows (*.jsonl, *.parquet, hf:NAME) or text.", show_default=False
        ),
    ] = "",
    method: Annotated[str, typer.Option(metavar="NAME", help="bone-row, miss, lora, state, ...; see --methods.")] = (
        "bone-row"
    ),
    rank: Annotated[int | None, typer.Option(help="Of the method. Default: its own.", show_default=False)] = None,
    epochs: Annotated[float | None, typer.Option(help="How often the text is read.", show_default="3")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Frozen matrices in bfloat16, nf4, fp4, int8-block or int8-row.", show_default="float32"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Run folder. Default: runs/SOURCE-METHOD.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print parameters, memory and time, after three steps; write nothing.")
    ] = False,
    methods: Annotated[bool, typer.Option("--methods", help="List all methods and their learning rates.")] = False,
) -> None:
    """Train an adapter of a checkpoint on your own conversations or text. The checkpoint stays as it is.

    [bold]wkv finetune --data chats.jsonl[/]                       the starter, with bone-row
    [bold]wkv finetune model.pth --method state --data chats.jsonl data.tokenizer=world[/]
    [bold]wkv chat model.pth --adapter runs/chats-state/adapter.safetensors[/]
                                                       talk with the result
    """
    from wkv.cli.train import show_estimate, source_name
    from wkv.errors import RecipeError
    from wkv.training import resume_recipe

    if methods:
        return list_methods()
    given = list(arguments or [])
    model = given.pop(0) if given and "=" not in given[0] else None
    if resume:
        if out is None or model or data or dry_run:
            raise RecipeError("a resumed run keeps its model and data: wkv finetune --out FOLDER --resume")
        return run(resume_recipe(out, given), out, resume=True)
    options = {"tuning.rank": rank, "train.epochs": epochs, "tuning.base": base}
    extra = [f"{key}={value}" for key, value in options.items() if value is not None]
    recipe = finetune_recipe(model or "starter", data, method, [*extra, *given])
    if dry_run:
        return show_estimate(recipe)
    return run(recipe, out or Path(f"runs/{source_name(data)}-{recipe.tuning.method}"), resume=False)


def finetune_recipe(model: str, data: str, method: str, overrides: list[str]) -> Recipe:
    """The recipe `finetune` for a model, data and method, with the method's own learning rate, order and rank.

    Raises:
        RecipeError: if there is no data, or the recipe cannot be.
    """
    from wkv.cli.train import quoted
    from wkv.errors import RecipeError
    from wkv.training import load_recipe
    from wkv.tuning import METHODS, canonical

    if not data:
        raise RecipeError("--data: name the conversations or the text to train on")
    name = canonical(method)
    found = METHODS[name]
    state = "state" in name
    values = {
        "train.start_from": quoted(model),
        "data.source": quoted(data),
        "tuning.method": name,
        "tuning.rank": "null",
        "train.learning_rate": f"{found.learning_rate:g}",
        "train.final_learning_rate": f"{found.learning_rate * (0.01 if state else 0.1):g}",
        "data.order": "padded" if state else "whole",
    }
    return load_recipe("finetune", [*(f"{key}={value}" for key, value in values.items()), *overrides])


def run(recipe: Recipe, folder: Path, resume: bool) -> None:
    """Train, then say what came out and how to use it; an interrupted run ends the command with status 130."""
    from wkv.cli.train import main_console, report, say
    from wkv.training import train as train_model

    console = main_console()
    result = train_model(recipe, folder, resume, console)
    if not result.finished:
        say(console, f"stopped after step {result.steps:,}; everything is saved. Go on with")
        say(console, f"  wkv finetune --out {shlex.quote(result.out)} --resume")
        raise typer.Exit(130)
    report(console, result)
    say(console, "talk with it:")
    say(console, f"  wkv chat {shlex.quote(recipe.train.start_from or '')} --adapter {shlex.quote(best(result))}")


def best(result: Result) -> str:
    """The adapter of the best evaluation where there was one, else the last."""
    path = Path(result.out) / "best.safetensors"
    return str(path) if path.is_file() else result.model


def list_methods() -> None:
    """Every method, its learning rate, and what it is."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from wkv.tuning import METHODS

    table = Table("method", "learning rate", "", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, method in METHODS.items():
        table.add_row(name, f"{method.learning_rate:g}", escape(method.about))
    Console().print(table, highlight=False)
