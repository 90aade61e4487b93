"""The command line: `wkv VERB ...`, one file per verb. Heavy imports happen inside the verbs, so `--help` is quick."""

from __future__ import annotations

import importlib.util
import sys

import typer

from wkv.errors import WkvError

app = typer.Typer(
    name="wkv",
    help="The RWKV family of recurrent language models: load, train, sample and inspect.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True)) -> None:
    """The RWKV family of recurrent language models: load, train, sample and inspect."""
    if version:
        from wkv import __version__

        typer.echo(f"wkv {__version__}")
        raise typer.Exit


def _register(verbs: tuple[str, ...]) -> None:
    for verb in verbs:
        if importlib.util.find_spec(f"wkv.cli.{verb}") is None:
            continue
        module = importlib.import_module(f"wkv.cli.{verb}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=verb)
        else:
            app.command(verb)(getattr(module, verb))


_register(("demo", "info", "generate", "chat", "train", "finetune", "merge", "upgrade", "quantize"))
_register(("eval", "bench", "tokenizer", "doctor"))


def main() -> None:
    """Run the command line; a `WkvError` becomes one line on stderr and exit status 1."""
    try:
        app()
    except WkvError as error:
        from rich.console import Console
        from rich.markup import escape

        message = f"[bold red]error:[/] {escape(str(error))}"
        Console(stderr=True, soft_wrap=True).print(message, highlight=False)
        sys.exit(1)
