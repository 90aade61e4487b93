"""`wkv generate`: continue a prompt with a model from a file."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from wkv.errors import WkvError

if TYPE_CHECKING:
    from wkv.inference import Generation
    from wkv.layers.language_model import LanguageModel
    from wkv.state import State

# Options that `wkv chat` has as well.
MODEL = typer.Argument(..., help="Checkpoint: a file or a folder, of any version; `starter` is that of the package.")
TEMPERATURE = typer.Option(1.0, help="0 always takes the most likely token.")
TOP_K = typer.Option(0, help="Choose among the k most likely tokens; 0: all.")
MIN_P = typer.Option(0.0, help="Choose among tokens at least this fraction as likely as the first.")
TYPICAL_P = typer.Option(1.0, help="Choose among the most typical tokens of this total probability.")
SEED = typer.Option(None, help="Makes the result reproducible.")
TOKENIZER = typer.Option(None, help='"world", "bytes" or a tokenizer.json; by default the model\'s own.')
DTYPE = typer.Option(None, help="float32, bfloat16 or float16; by default that of the file.")
DEVICE = typer.Option(None, help='Where to run, such as "cpu" or "cuda".')
STATE = typer.Option(None, help="Go on from a state file.")
ADAPTER = typer.Option(None, help="An adapter of this model, as `wkv finetune` makes them.")
MAPPED = typer.Option(False, "--mapped", help="Leave the weights in the mapped file: slower, shared between processes.")


def generate(
    model: str = typer.Argument(
        ...,
        help="Checkpoint: a file or a folder, of any version, or `starter`. A single argument that is no file is the "
        "prompt, and the starter continues it.",
    ),
    prompt: str | None = typer.Argument(
        None, help='Text to continue; "-" reads it from standard input, every byte of it.'
    ),
    max_tokens: int = typer.Option(100, help="Longest continuation."),
    temperature: float | None = typer.Option(
        None, help="0 always takes the most likely token.", show_default="1.0; 0.8 for the starter"
    ),
    top_k: int = TOP_K,
    top_p: float | None = typer.Option(
        None,
        help="Choose among the most likely tokens of this total probability.",
        show_default="1.0; 0.9 for the starter",
    ),
    min_p: float = MIN_P,
    typical_p: float = TYPICAL_P,
    presence_penalty: float = typer.Option(0.0, help="Lowers tokens that were generated before."),
    frequency_penalty: float = typer.Option(0.0, help="Lowers tokens for each time they were generated before."),
    seed: int | None = SEED,
    stop: list[str] = typer.Option([], help="End before this text (may be repeated)."),  # noqa: B008
    tokenizer: str | None = TOKENIZER,
    dtype: str | None = DTYPE,
    device: str | None = DEVICE,
    state: Path | None = STATE,
    save_state: Path | None = typer.Option(None, help="Write the state after the last token to this file."),  # noqa: B008
    no_stream: bool = typer.Option(False, "--no-stream", help="Print the text when it is complete."),
    logprobs: int = typer.Option(0, help="Report so many alternatives per token (prints JSON)."),
    as_json: bool = typer.Option(False, "--json", help="Print one line of JSON per continuation."),
    num: int = typer.Option(1, "--num", "-n", min=1, help="Number of continuations."),
    adapter: Path | None = ADAPTER,
    mapped: bool = MAPPED,
) -> None:
    """Continue a prompt. Text goes to standard output, speed to standard error.

    [bold]wkv generate "The state of"[/]          the starter, a small model of speeches inside the package
    [bold]wkv generate model.pth "The state of"[/]
    """
    import wkv
    from wkv.inference import Sampler
    from wkv.inference.huge_pages import use_huge_pages
    from wkv.inference.pages import give_back_libraries

    source, prompt, sampling = choose(model, prompt)
    given = {"temperature": temperature, "top_p": top_p}
    sampling |= {name: value for name, value in given.items() if value is not None}
    sampler = Sampler(
        top_k=top_k, min_p=min_p, typical_p=typical_p, presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty, seed=seed, **sampling,
    )  # fmt: skip
    check_folder(save_state)
    loaded = wkv.load_model(source, dtype=dtype, device=device)
    mount(loaded, adapter)
    give_back_libraries()
    if not mapped:
        use_huge_pages(loaded)
    text: str | bytes = typer.get_binary_stream("stdin").read() if prompt == "-" else prompt
    options: dict[str, Any] = {
        "max_tokens": max_tokens, "sampler": sampler, "state": load_state(loaded, state, num), "stop": stop,
        "tokenizer": tokenizer, "logprobs": logprobs, "return_state": save_state is not None,
    }  # fmt: skip
    as_json = as_json or logprobs > 0
    run(loaded, [text] * num, options, save_state, as_json, stream=not (no_stream or as_json or num > 1))


def choose(model: str, prompt: str | None) -> tuple[str, str, dict[str, float]]:
    """(model, prompt, sampling) of one or two arguments: a single one that is no file is a prompt for the starter.

    Raises:
        WkvError: if a single argument is not there, but looks like the path of a checkpoint.
    """
    from wkv import starter

    if prompt is not None or model == starter.NAME or os.path.exists(model):
        return model, prompt or "", dict(starter.SAMPLING) if model == starter.NAME else {}
    if looks_like_a_path(model):
        raise WkvError(f"{model}: no such file or folder. If it is a prompt: wkv generate starter {shlex.quote(model)}")
    typer.echo("no model is named: the starter that comes with wkv continues the text", err=True)
    return str(starter.path()), model, dict(starter.SAMPLING)


def looks_like_a_path(text: str) -> bool:
    """Whether `text` is the path of a checkpoint rather than a prompt: it ends like one, or separates folders.

    A separator among blanks, as in "he and/or she", is part of a sentence.
    """
    from wkv.checkpoints.files import SUFFIXES

    separators = {os.sep, os.altsep or os.sep}
    one_word = not any(character.isspace() for character in text)
    begins = text.startswith(tuple(f"{start}{mark}" for start in ("", ".", "..", "~") for mark in separators))
    return text.endswith((*SUFFIXES, ".json")) or begins or (one_word and bool(separators & set(text)))


def mount(model: LanguageModel, adapter: Path | None) -> None:
    """Put an adapter on the model, or, where its weights can take it up, into it: that is faster."""
    if adapter is None:
        return
    from wkv import tuning
    from wkv.quantization import is_quantized

    mounted = tuning.load(adapter, model)
    if mounted.mergeable and not is_quantized(model):
        mounted.merge()


def load_state(model: LanguageModel, path: Path | None, rows: int) -> State | None:
    """The state in a file, for `rows` continuations."""
    from wkv.state import State

    if path is None:
        return None
    state = State.load(path, next(model.parameters()).device)
    return state if state.batch_size == rows else state.select([0] * rows) if state.batch_size == 1 else state


def check_folder(path: Path | None) -> None:
    """Raise `WkvError` if a file cannot be written to `path` because its folder is missing."""
    if path is not None and not path.absolute().parent.is_dir():
        raise WkvError(f"{path} cannot be written: there is no folder {path.absolute().parent}")


def run(
    model: LanguageModel,
    prompts: list[Any],
    options: dict[str, Any],
    save_state: Path | None,
    as_json: bool,
    stream: bool,
) -> None:
    """Generate, print, report the speed, save the state."""
    import wkv
    from wkv.state import State

    started = time.perf_counter()
    try:
        made = wkv.generate(model, prompts, stream=True, **options)
        for _, piece in made:
            if stream:
                typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        typer.echo("\ninterrupted", err=True)
        raise typer.Exit(130) from None
    results: list[Generation] = made.result
    show(results, as_json, stream)
    report(results, time.perf_counter() - started)
    if save_state is not None:
        State.stack([result.state for result in results if result.state is not None]).save(save_state)


def show(results: list[Generation], as_json: bool, streamed: bool) -> None:
    """Print what was not streamed."""
    if streamed:
        typer.echo()
        return
    for number, result in enumerate(results, start=1):
        if as_json:
            fields = ("text", "tokens", "logprobs", "top_logprobs", "finish_reason", "prompt_tokens")
            typer.echo(json.dumps({name: getattr(result, name) for name in fields}))
            continue
        if len(results) > 1:
            typer.echo(f"--- {number} of {len(results)} ---")
        typer.echo(result.text)


def report(results: list[Generation], seconds: float) -> None:
    """Print the speed to standard error."""
    read = sum(result.prompt_tokens for result in results)
    made = sum(len(result.tokens) for result in results)
    rate = made / max(seconds, 1e-9)
    typer.echo(f"{made} tokens in {seconds:.2f} s, {rate:.1f} tokens/s (after {read} prompt tokens)", err=True)
