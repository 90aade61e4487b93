"""`wkv demo`: read what the starter writes, then train a small RWKV-7 on the same text and read what that writes."""

from __future__ import annotations

import lzma
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from wkv.training import Recipe, Result

PROMPT = "The state of the Union is"


def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe `demo`.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    prompt: Annotated[str, typer.Option(help="What the model is to continue.")] = PROMPT,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier demo in the run folder.")] = False,
) -> None:
    """Let the starter of the package write, train a smaller RWKV-7 on the same speeches, and let that one write too.

    The new model is compared with xz. Takes about two minutes on two CPU cores. An interrupted demo goes on where it
    stopped when it is called again.
    """
    from rich.console import Console

    from wkv.cli.train import report, run, say
    from wkv.training import read_result

    console = Console(soft_wrap=True)
    if fresh:
        _remove(out)
    result = read_result(out)
    if result is None:
        recipe, resume = _plan(out, overrides or [])
        _introduce(console, prompt)
        result = run(recipe, out, resume)
        _compare(console, recipe, result)
    else:
        say(console, f"The demo in {out} is finished; `wkv demo --fresh` deletes it and trains again.")
        report(console, result)
    _write(console, result.model, prompt, 120)
    _next(console, result)


def _plan(out: Path, overrides: list[str]) -> tuple[Recipe, bool]:
    """The recipe, and whether a run is under way."""
    from wkv.training import load_recipe, resume_recipe

    if (out / "recipe.yaml").is_file():
        return resume_recipe(out, overrides), True
    return load_recipe("demo", overrides), False


def _remove(out: Path) -> None:
    """Delete a run folder, and nothing that is not one."""
    from wkv.errors import WkvError

    if out.is_dir() and any(out.iterdir()) and not (out / "recipe.yaml").is_file():
        raise WkvError(f"{out} is not a run folder (there is no recipe.yaml in it); delete it yourself or choose --out")
    if out.is_dir():
        shutil.rmtree(out)


def _compare(console: Console, recipe: Recipe, result: Result) -> None:
    from wkv.cli.train import say
    from wkv.data import Document, load_documents
    from wkv.training.source import divide

    _, held_out = divide(load_documents(recipe.data.source, recipe.data.row_fields()), recipe.data)
    texts = [part.text if isinstance(part, Document) else part for part in held_out]
    text = b"".join(part.encode() if isinstance(part, str) else part for part in texts)
    if not text:
        return
    packed = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    say(console, f"            {packed:.3f} bits per byte for xz -9e on the same text")


def _introduce(console: Console, prompt: str) -> None:
    """What the starter of the package is, and a few lines of it."""
    from wkv import starter
    from wkv.cli.train import say
    from wkv.training.display import duration

    card = starter.card()
    training, score = card["training"], card["held_out"]["bits_per_byte"]
    size = f"rwkv7, {card['model']['parameters']:,} parameters, trained for {duration(training['seconds'])}"
    say(console, f"starter     {size} before it came into the package")
    say(console, f"held out    {score:.3f} bits per byte of speeches never trained on. It writes")
    _write(console, str(starter.path()), prompt, 60)
    say(console, "Now a smaller one learns from the same speeches.")


def _write(console: Console, source: str, prompt: str, max_tokens: int) -> None:
    """Stream a continuation of the prompt."""
    import wkv
    from wkv.cli.train import say

    sampler = wkv.Sampler(**wkv.starter.SAMPLING)
    model = wkv.load_model(source)
    say(console, "")
    console.print(prompt, end="", highlight=False, markup=False, style="bold")
    for piece in wkv.generate(model, prompt, max_tokens=max_tokens, sampler=sampler, seed=1, stream=True):
        console.print(piece, end="", highlight=False, markup=False)
    console.print("\n")


def _next(console: Console, result: Result) -> None:
    from wkv.cli.train import say

    say(console, "next")
    say(console, f'  wkv generate {shlex.quote(result.model)} "My fellow citizens,"   # let it write more')
    say(console, "  wkv train your-book.txt" + " " * 34 + "# train on your own text")
