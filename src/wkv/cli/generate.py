"""`wkv generate`: continue a prompt with a model from a file."""

from __future__ import annotations

import json
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
MODEL = typer.Argument(..., help="Checkpoint: a file or a folder, of any version.")
TEMPERATURE = typer.Option(1.0, help="0 always takes the most likely token.")
TOP_K = typer.Option(0, help="Choose among the k most likely tokens; 0: all.")
MIN_P = typer.Option(0.0, help="Choose among tokens at least this fraction as likely as the first.")
TYPICAL_P = typer.Option(1.0, help="Choose among the most typical tokens of this total probability.")
SEED = typer.Option(None, help="Makes the result reproducible.")
TOKENIZER = typer.Option(None, help='"world", "bytes" or a tokenizer.json; by default the model\'s own.')
DTYPE = typer.Option(None, help="float32, bfloat16 or float16; by default that of the file.")
DEVICE = typer.Option(None, help='Where to run, such as "cpu" or "cuda".')
STATE = typer.Option(None, help="Go on from a state file.")
MAPPED = typer.Option(False, "--mapped", help="Leave the weights in the mapped file: slower, shared between processes.")


def generate(
    model: str = MODEL,
    prompt: str = typer.Argument("", help='Text to continue; "-" reads it from standard input, every byte of it.'),
    max_tokens: int = typer.Option(100, help="Longest continuation."),
    temperature: float = TEMPERATURE,
    top_k: int = TOP_K,
    top_p: float = typer.Option(1.0, help="Choose among the most likely tokens of this total probability."),
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
    mapped: bool = MAPPED,
) -> None:
    """Continue a prompt. Text goes to standard output, speed to standard error."""
    import wkv
    from wkv.inference import Sampler
    from wkv.inference.huge_pages import use_huge_pages
    from wkv.inference.pages import give_back_libraries

    sampler = Sampler(
        temperature, top_k, top_p, min_p, typical_p, presence_penalty, frequency_penalty, seed=seed
    )  # fmt: skip
    check_folder(save_state)
    loaded = wkv.load_model(model, dtype=dtype, device=device)
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
