"""`wkv chat`: a conversation with a model from a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from wkv.cli.generate import (
    ADAPTER,
    DEVICE,
    DTYPE,
    MAPPED,
    MIN_P,
    MODEL,
    SEED,
    STATE,
    TEMPERATURE,
    TOKENIZER,
    TOP_K,
    TYPICAL_P,
    mount,
)
from wkv.errors import WkvError

if TYPE_CHECKING:
    from wkv.inference import Chat

HELP = """/reset      forget the conversation
/save FILE  write the conversation's state to a file
/load FILE  go on with a saved conversation
/exit       leave (so does Ctrl-D; Ctrl-C breaks an answer off)
/help       this list"""


def chat(
    model: str = MODEL,
    system: str | None = typer.Option(None, help="How the model is to behave."),
    think: str = typer.Option("none", help="none, fake, empty or on: whether a G1 model thinks before it answers."),
    template: str = typer.Option("chat", help="The prompt format: chat, question or instruction."),
    max_tokens: int = typer.Option(1000, help="Longest answer."),
    temperature: float = TEMPERATURE,
    top_k: int = TOP_K,
    top_p: float = typer.Option(0.85, help="Choose among the most likely tokens of this total probability."),
    min_p: float = MIN_P,
    typical_p: float = TYPICAL_P,
    presence_penalty: float = typer.Option(0.2, help="Lowers tokens that the answer has used before."),
    frequency_penalty: float = typer.Option(0.2, help="Lowers tokens for each time the answer has used them."),
    seed: int | None = SEED,
    tokenizer: str | None = TOKENIZER,
    dtype: str | None = DTYPE,
    device: str | None = DEVICE,
    state: Path | None = STATE,
    adapter: Path | None = ADAPTER,
    mapped: bool = MAPPED,
) -> None:
    """Talk with a model in a World prompt format. Reads one message per line, also from a pipe."""
    import wkv
    from wkv.inference import Chat, Sampler
    from wkv.inference.huge_pages import use_huge_pages
    from wkv.inference.pages import give_back_libraries

    sampler = Sampler(
        temperature, top_k, top_p, min_p, typical_p, presence_penalty, frequency_penalty, seed=seed
    )  # fmt: skip
    loaded = wkv.load_model(model, dtype=dtype, device=device)
    mount(loaded, adapter)
    give_back_libraries()
    if not mapped:
        use_huge_pages(loaded)
    conversation = Chat(loaded, system, sampler, think, max_tokens, tokenizer, template)
    if state is not None:
        conversation.load(state)
    talk(conversation, interactive=sys.stdin.isatty())


def talk(conversation: Chat, interactive: bool) -> None:
    """Answer line by line. At a terminal an error is shown and the conversation goes on; from a pipe it ends it."""
    if interactive:
        typer.echo("Type a message, or /help.")
    for line in messages(interactive):
        try:
            if not obey(conversation, line):
                break
        except WkvError as error:
            if not interactive:
                raise
            from rich.console import Console

            Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        except KeyboardInterrupt:
            if not interactive:
                raise typer.Exit(130) from None
            typer.echo("\n(broken off; the conversation stands as before this message)", err=True)


def messages(interactive: bool) -> Iterator[str]:
    """Lines of the user that are not empty, until the end of input."""
    from rich.console import Console

    console = Console()
    while True:
        try:
            line = console.input("[bold green]User:[/] ") if interactive else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()


def obey(conversation: Chat, line: str) -> bool:
    """Carry out one line, a command or a message. Returns whether to go on."""
    if not line.startswith("/"):
        answer(conversation, line)
        return True
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command in ("/save", "/load") and not argument:
        raise WkvError(f"{command} needs the name of a file")
    if command == "/exit":
        return False
    if command == "/help":
        typer.echo(HELP)
    elif command == "/reset":
        conversation.reset()
    elif command == "/save":
        save(conversation, argument)
    elif command == "/load":
        conversation.load(argument)
    else:
        raise WkvError(f"there is no command {command}; type /help")
    return True


def save(conversation: Chat, path: str) -> None:
    """Write the state; what the system refuses becomes a `WkvError`."""
    try:
        conversation.save(path)
    except OSError as error:
        raise WkvError(f"{path} cannot be written: {error.strerror}") from error


def answer(conversation: Chat, message: str) -> None:
    """Stream one answer to standard output."""
    typer.secho("Assistant: ", fg="blue", bold=True, nl=False)
    for piece in conversation.send(message, stream=True):
        typer.echo(piece, nl=False)
    typer.echo("\n")
