"""`wkv info`: what a checkpoint or state file is, read from its contents without loading it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from wkv.checkpoints import CheckpointInfo


def info(
    source: list[str] = typer.Argument(  # noqa: B008
        help="A checkpoint, a folder of shards, several shards, a saved state, or `starter`, the model of the package."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON for machines."),
) -> None:
    """Say what a file is: version, sizes, parameters, types, state memory, missing or unexpected keys.

    Exit status 0 if it can be loaded, 1 if not.
    """
    from wkv.checkpoints import inspect

    found = inspect(source[0] if len(source) == 1 else source)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        show(found)
    if not found.loadable:
        raise typer.Exit(1)


def show(found: CheckpointInfo) -> None:
    """Print the verdict, then a table of facts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(found.verdict, style="bold green" if found.loadable else "bold red"), soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows(found):
        table.add_row(Text(name), Text(text))
    console.print(table)


def rows(found: CheckpointInfo) -> list[tuple[str, str]]:
    """(name, text) of every fact worth a line."""
    facts = [
        ("source", found.source),
        ("format", found.format),
        ("model", found.model),
        *groups(found),
        ("stored as", ", ".join(stored_as(found))),
        ("file size", size(found.file_bytes)),
        ("state", f"{size(found.state_bytes)} per sequence"),
        ("tokenizer", found.tokenizer or ""),
        *few("missing", found.missing),
        *few("unexpected", found.unexpected),
        *few("does not fit", found.misfits),
        *(("note", text) for text in found.notes),
    ]
    return [fact for fact in facts if fact[1]]


def stored_as(found: CheckpointInfo) -> list[str]:
    """One text for each kind: "int4 (48 tensors, 1.2 MB)"."""
    sizes = {kind: f", {size(count).split(' (')[0]}" for kind, count in found.kind_bytes.items()}
    return [f"{kind} ({count} tensors{sizes.get(kind, '')})" for kind, count in found.dtypes.items()]


def groups(found: CheckpointInfo) -> list[tuple[str, str]]:
    """The configuration in three lines: sizes, ranks, eps."""
    lines: dict[str, list[str]] = {"sizes": [], "ranks": [], "eps": []}
    for name, value in found.config.items():
        suffix = name.rpartition("_")[2]
        line, short = {"rank": ("ranks", 5), "eps": ("eps", 4)}.get(suffix, ("sizes", 0))
        lines[line].append(f"{name[: len(name) - short].replace('_', ' ')} {value}")
    return [(name, ", ".join(texts)) for name, texts in lines.items()]


def few(name: str, texts: list[str], limit: int = 12) -> list[tuple[str, str]]:
    """One line each, the rest of a long list counted."""
    more = [(name, f"... and {len(texts) - limit} more")] if len(texts) > limit else []
    return [*((name, text) for text in texts[:limit]), *more]


def size(count: int) -> str:
    """12345678 -> "12.3 MB (12,345,678 bytes)"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit} ({count:,} bytes)"
    return f"{count:,} bytes"
