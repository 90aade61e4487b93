"""The keys of recipes, with their defaults and meanings, as the sections document them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

from wkv.training.sections import DataRecipe, FieldNames, ModelRecipe, TrainRecipe, TuningRecipe


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of every key."""
    meanings = _meanings(ModelRecipe)
    yield "model.name", "rwkv7", meanings["name"]
    yield "model.preset", "", meanings["preset"]
    yield "model.*", "", "a field of the model's configuration, such as num_layers, hidden_size, head_size"
    for section, recipe in (("data", DataRecipe), ("train", TrainRecipe), ("tuning", TuningRecipe)):
        meanings, defaults = _meanings(recipe), dataclasses.asdict(recipe())
        for key, default in defaults.items():
            if key == "fields":
                yield f"{section}.{key}.*", "", f"{meanings[key]} ({', '.join(vars(FieldNames()))})"
            else:
                yield f"{section}.{key}", _plain(default), meanings.get(key, "the budget: give one of these four")


def _plain(default: Any) -> str:
    return "" if default is None else default if isinstance(default, str) else json.dumps(default)


def _meanings(recipe: type) -> dict[str, str]:
    """What the docstring says about each argument; several share a line."""
    text = inspect.getdoc(recipe) or ""
    found: dict[str, str] = {}
    for names, meaning in re.findall(
        r"^    ([a-z_0-9, ]+): (.*(?:\n {8}.*)*)", text.partition("Args:")[2], re.MULTILINE
    ):
        found |= dict.fromkeys(names.split(", "), " ".join(meaning.split()).removesuffix("."))
    return found
