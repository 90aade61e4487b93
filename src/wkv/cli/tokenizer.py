"""`wkv tokenizer`: train a vocabulary, turn text into ids and back, see what a tokenizer is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from wkv.errors import TokenizerError

if TYPE_CHECKING:
    from wkv.tokenizers import Tokenizer

app = typer.Typer(help="Train a vocabulary; turn text into ids and back.", no_args_is_help=True)

TOKENIZER = typer.Option("world", "--tokenizer", "-t", help='"world", "bytes" or a tokenizer.json.')


@app.command()
def train(
    files: list[Path] = typer.Argument(..., help="Text files, or folders: every .txt file in them."),  # noqa: B008
    vocab_size: int = typer.Option(2048, help="Number of ids: end of text, 256 bytes, then merges."),
    out: Path = typer.Option(Path("tokenizer.json"), help="The file to write."),  # noqa: B008
    force: bool = typer.Option(False, "--force", help="Replace the file if it exists."),
) -> None:
    """Train a byte-level BPE vocabulary on text."""
    from wkv.tokenizers import BPETokenizer

    if out.exists() and not force:
        raise TokenizerError(f"{out} exists already: choose another --out, or pass --force to replace it")
    if not out.parent.is_dir():
        raise TokenizerError(f"the folder {out.parent} does not exist: create it, or choose another --out")
    texts = text_files(files)
    trained = BPETokenizer.train(texts, vocab_size, progress=sys.stderr.isatty())
    trained.save(out)
    fewer = "" if trained.vocab_size == vocab_size else f" ({vocab_size} asked for: the text has no more to merge)"
    typer.echo(f"{out}: {trained.vocab_size} ids{fewer}, from {len(texts)} file{'s' * (len(texts) != 1)}")


@app.command()
def encode(
    text: str = typer.Argument(..., help='The text; "-" reads it from standard input, every byte of it.'),
    tokenizer: str = TOKENIZER,
) -> None:
    """Print the ids of a text."""
    from wkv.tokenizers import load

    ids = load(tokenizer).encode(sys.stdin.buffer.read() if text == "-" else text)
    typer.echo(" ".join(map(str, ids)))


@app.command()
def decode(ids: list[int] = typer.Argument(..., help="Token ids."), tokenizer: str = TOKENIZER) -> None:  # noqa: B008
    """Print the text that ids stand for."""
    from wkv.tokenizers import load

    typer.echo(load(tokenizer).decode(ids))


@app.command()
def info(
    name: str | None = typer.Argument(None, help='"world", "bytes" or a tokenizer.json; without it, the names.'),
) -> None:
    """Say what a tokenizer is."""
    from wkv.tokenizers import available, load

    if name is None:
        typer.echo(f"{', '.join(available())}, or the path of a tokenizer.json")
        return
    for key, value in describe(load(name)).items():
        typer.echo(f"{key:14} {value}")


def describe(tokenizer: Tokenizer) -> dict[str, str]:
    """What `info` prints: kind, sizes in ids and bytes, and the ids of a sample."""
    tokens = [tokenizer.decode_bytes([index]) for index in range(tokenizer.vocab_size)]
    longest = max(tokens, key=len)
    sample = "Hello, world!"
    return {
        "kind": str(tokenizer.to_dict()["kind"]),
        "vocabulary": f"{tokenizer.vocab_size} ids, {sum(map(bool, tokens))} of them stand for bytes",
        "end of text": "none" if tokenizer.eos_id is None else f"id {tokenizer.eos_id}",
        "longest token": f"{len(longest)} bytes",
        "sample": f"{sample!r} is {' '.join(map(str, tokenizer.encode(sample)))}",
    }


def text_files(paths: list[Path]) -> list[Path]:
    """The files named, and every .txt file under the folders named, in sorted order."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(entry for entry in path.rglob("*.txt") if entry.is_file())
            if not inside:
                raise TokenizerError(f"there is no .txt file in the folder {path}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise TokenizerError(f"there is no file or folder {path}")
    return found
