"""From what a user gives as a prompt to token ids, and which tokenizer does it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from wkv.errors import WkvError
from wkv.layers.language_model import LanguageModel
from wkv.tokenizers import Tokenizer
from wkv.tokenizers import load as load_tokenizer

# A model that says nothing of its tokenizer: these vocabulary sizes are those of one tokenizer only.
_BY_VOCAB_SIZE = {65536: "world", 65530: "world", 256: "bytes"}


def find_tokenizer(model: LanguageModel, tokenizer: Tokenizer | str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer to use: the argument (an object, a name, a path), else the model's own, else by vocabulary size.

    Raises:
        WkvError: if nothing tells which one it is.
    """
    found: Any = tokenizer if tokenizer is not None else model.tokenizer
    if found is None:
        found = _usual(model.config.vocab_size)
    if isinstance(found, str | os.PathLike):
        found = load_tokenizer(found)
    if not isinstance(found, Tokenizer):
        raise WkvError(f"tokenizer must be a wkv tokenizer, a name or a path, found {type(found).__name__}")
    return found


@lru_cache
def _usual(vocab_size: int) -> Any:
    if vocab_size not in _BY_VOCAB_SIZE:
        raise WkvError(
            f"the model has no tokenizer, and no known one belongs to a vocabulary of {vocab_size}; "
            'pass tokenizer="world", "bytes", or the path of a tokenizer.json'
        )
    return load_tokenizer(_BY_VOCAB_SIZE[vocab_size])


def as_batch(prompt: Any) -> tuple[list[Any], bool]:
    """(list of prompts, whether the user gave a list of them)."""
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    if isinstance(prompt, list | tuple) and prompt and not all(_is_id(item) for item in prompt):
        return list(prompt), True
    return [prompt], False


def encode_prompt(prompt: Any, tokenizer: Tokenizer, vocab_size: int, carried: bool) -> list[int]:
    """Token ids of one prompt, checked against the model's vocabulary.

    An empty prompt becomes the tokenizer's end-of-text id, after which a new document starts.

    Args:
        prompt: text, bytes, or ids.
        carried: whether a state is carried on; then an empty prompt has no meaning.

    Raises:
        WkvError: for other types, ids outside the vocabulary, and empty prompts that cannot be continued.
    """
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    if isinstance(prompt, str | bytes):
        ids = tokenizer.encode(prompt)
    elif isinstance(prompt, list | tuple) and all(_is_id(item) for item in prompt):
        ids = [int(item) for item in prompt]
    else:
        raise WkvError(f"a prompt is text, bytes or a list of token ids (or a list of prompts), found {brief(prompt)}")
    ids = ids or [_start_id(tokenizer, carried)]
    for token in ids:
        if not 0 <= token < vocab_size:
            raise WkvError(
                f"token id {token} of the prompt is outside the model's vocabulary [0, {vocab_size}); "
                f"is {tokenizer!r} the tokenizer of this model?"
            )
    return ids


def _start_id(tokenizer: Tokenizer, carried: bool) -> int:
    if carried:
        raise WkvError("the prompt is empty: a carried state needs at least one new token to go on from")
    if tokenizer.eos_id is None:
        raise WkvError(f"the prompt is empty and {tokenizer!r} has no end-of-text id to start from; give a first word")
    return tokenizer.eos_id


def as_stops(stop: str | bytes | Sequence[str | bytes]) -> tuple[bytes, ...]:
    """Stop strings as bytes.

    Raises:
        WkvError: if one is empty or not text.
    """
    stops = [stop] if isinstance(stop, str | bytes) else stop
    if not isinstance(stops, list | tuple | set | frozenset):
        raise WkvError(f"stop must be a string or a list of strings, found {brief(stop)}")
    for item in stops:
        if not isinstance(item, str | bytes) or not item:
            raise WkvError(f"a stop string must be a non-empty text, found {brief(item)}")
    return tuple(item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item for item in stops)


def as_stop_ids(stop_ids: Sequence[int] | None, tokenizer: Tokenizer, vocab_size: int) -> frozenset[int]:
    """Stop ids as a set: those given, else the tokenizer's end-of-text id.

    Raises:
        WkvError: if one is no id of the model's vocabulary.
    """
    if stop_ids is None:
        return end_ids(tokenizer, vocab_size)
    if not isinstance(stop_ids, list | tuple | set | frozenset):
        raise WkvError(f"stop_ids must be a list of token ids, found {brief(stop_ids)}")
    for token in stop_ids:
        if not _is_id(token) or not 0 <= token < vocab_size:
            raise WkvError(f"stop id {brief(token)} is not an id of the model's vocabulary [0, {vocab_size})")
    return frozenset(stop_ids)


def end_ids(tokenizer: Tokenizer, vocab_size: int) -> frozenset[int]:
    """The tokenizer's end-of-text id if it has one that the model knows, as a set."""
    eos = tokenizer.eos_id
    return frozenset() if eos is None or eos >= vocab_size else frozenset({eos})


def left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one batch, padded on the left: tokens int64 [B, T], mask bool [B, T]."""
    longest = max(len(ids) for ids in prompts)
    padded = [[0] * (longest - len(ids)) + list(ids) for ids in prompts]
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
    return torch.tensor(padded, device=device), mask


def brief(value: object) -> str:
    """A value as an error message shows it: `repr`, cut to one line's length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_id(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)
