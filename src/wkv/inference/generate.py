"""`generate`: text from a model and a prompt, or from several prompts at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, TypedDict, Unpack, overload

import torch

from wkv.errors import WkvError
from wkv.inference.engine import Engine, Generation, Options, evaluating
from wkv.inference.prompts import as_batch, as_stop_ids, as_stops, encode_prompt, find_tokenizer
from wkv.inference.sampler import Sampler, check_seed
from wkv.layers.language_model import LanguageModel
from wkv.state import State, check_compatible
from wkv.tokenizers import Tokenizer

SinglePrompt = str | bytes | list[int] | torch.Tensor
PromptList = list[str] | list[bytes] | list[list[int]]


class Guide(Protocol):
    """Changes the states that prompts are read from, such as `wkv.tuning.Guidance`."""

    def states(
        self, model: LanguageModel, prompts: Sequence[Sequence[int]], start: State | None, tokenizer: Tokenizer
    ) -> State:
        """The states to read the prompts from, in place of `start` (None: that before the first token)."""
        ...


class Extras(TypedDict, total=False):
    """Keyword arguments of `generate` that do not change the type of its result."""

    tokenizer: Tokenizer | str | os.PathLike[str] | None
    stop: str | bytes | Sequence[str | bytes]
    stop_ids: Sequence[int] | None
    seed: int | None
    logprobs: int
    return_state: bool
    guide: Guide | None


class GenerationStream:
    """Iterates over text as it is generated: pieces (str) for one prompt, pairs (row, piece) for a list of prompts.

    Pieces are whole characters and never belong to a stop string; joined they are exactly the `text` of the result.
    """

    def __init__(self, model: LanguageModel, engine: Engine, batch: bool) -> None:
        self._model, self._engine, self._batch = model, engine, batch
        self._waiting: list[tuple[int, str]] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while not self._waiting:
            if not self._engine.running:
                raise StopIteration
            with evaluating(self._model):
                self._waiting = self._engine.step()
        row, piece = self._waiting.pop(0)
        return (row, piece) if self._batch else piece

    @property
    def result(self) -> Any:
        """The `Generation`, or the list of them for a list of prompts; generates what is still missing first."""
        with evaluating(self._model):
            while self._engine.running:
                self._waiting += self._engine.step()
        results = [row.result() for row in self._engine.rows]
        return results if self._batch else results[0]


@overload
def generate(
    model: LanguageModel,
    prompt: SinglePrompt,
    max_tokens: int = 100,
    sampler: Sampler | None = None,
    state: State | None = None,
    stream: Literal[False] = False,
    **extras: Unpack[Extras],
) -> Generation: ...


@overload
def generate(
    model: LanguageModel,
    prompt: PromptList,
    max_tokens: int = 100,
    sampler: Sampler | None = None,
    state: State | None = None,
    stream: Literal[False] = False,
    **extras: Unpack[Extras],
) -> list[Generation]: ...


@overload
def generate(
    model: LanguageModel,
    prompt: SinglePrompt | PromptList,
    max_tokens: int = 100,
    sampler: Sampler | None = None,
    state: State | None = None,
    *,
    stream: Literal[True],
    **extras: Unpack[Extras],
) -> GenerationStream: ...


def generate(
    model: LanguageModel,
    prompt: Any,
    max_tokens: int = 100,
    sampler: Sampler | None = None,
    state: State | None = None,
    stream: bool = False,
    *,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    stop: str | bytes | Sequence[str | bytes] = (),
    stop_ids: Sequence[int] | None = None,
    seed: int | None = None,
    logprobs: int = 0,
    return_state: bool = True,
    guide: Guide | None = None,
) -> Any:
    """Continue a prompt, or a list of different prompts together with the same results as one by one.

    Args:
        model: any language model of this library; it runs in evaluation mode, and its own mode is put back.
        prompt: str, bytes, list of ids, or a list of those. An empty one starts from the end-of-text id.
        max_tokens: at most so many new tokens per prompt; 0 only reads the prompt.
        sampler: how tokens are chosen; None draws from the model's own distribution.
        state: go on from this state (one sequence per prompt). None starts from `model.tuned_state` if the model has
            one, else from the empty past.
        stream: return an iterator over the text as it is generated.
        tokenizer: an object, a name or a path; None takes the model's own, else the one its vocabulary size tells.
        stop: text that ends the generation; it may spread over several tokens and is not part of the result.
        stop_ids: ids that end the generation; None means the tokenizer's end-of-text id, `()` none at all.
        seed: overrides the sampler's seed.
        logprobs: how many of the most likely tokens to report at every step.
        return_state: False saves reading the last token and keeps no state.
        guide: tunes the state that each prompt is read from first, such as `wkv.tuning.Guidance`.

    Returns:
        `Generation` for one prompt, a list of them for a list of prompts, `GenerationStream` with `stream=True`.

    Raises:
        WkvError: for options, prompts, ids or states that do not fit, and for logits that are not finite.
    """
    if sampler is not None and not isinstance(sampler, Sampler):
        raise WkvError(f"sampler must be a wkv.Sampler, found {type(sampler).__name__}")
    sampler = sampler or Sampler()
    check_seed(seed)
    found = find_tokenizer(model, tokenizer)
    prompts, batch = as_batch(prompt)
    vocab_size = model.config.vocab_size
    ids = [encode_prompt(item, found, vocab_size, carried=state is not None) for item in prompts]
    options = Options(
        max_tokens=_count("max_tokens", max_tokens),
        sampler=sampler,
        stops=as_stops(stop),
        stop_ids=as_stop_ids(stop_ids, found, vocab_size),
        alternatives=_count("logprobs", logprobs),
        keep_state=return_state,
    )
    start = starting_state(model, state, len(prompts))
    if guide is not None:
        start = guide.states(model, ids, start, found)
    engine = Engine(model, found, ids, start, options, sampler.seed if seed is None else seed)
    made = GenerationStream(model, engine, batch)
    return made if stream else made.result


def starting_state(model: LanguageModel, state: State | None, batch_size: int) -> State | None:
    """The state to start from: the one given, checked; else the model's tuned state for every row; else None, with
    which the model starts from the state before the first token.

    Raises:
        WkvError: if the state belongs to another model, device or batch size.
    """
    tuned = model.tuned_state
    template = model.init_state(1)
    if state is None and model.initial_state is not None:  # a state adapter is at work
        return None
    if state is None and tuned is not None:
        check_compatible(tuned, template, batch_size=1)
        return tuned.detach().to(template.device).select([0] * batch_size)
    if state is not None:
        check_compatible(state, template, template.device, batch_size)
        state = state.detach()
    return state


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise WkvError(f"{name} must be an integer of at least 0, found {value!r}")
    return value
