"""Recipes: complete training configurations as YAML files with `key=value` overrides, merged and typed by OmegaConf."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

import wkv
from wkv import registry
from wkv.errors import RecipeError, WkvError
from wkv.training.recipe_checks import BUDGETS, check_keys, check_recipe
from wkv.training.sections import DataRecipe, FieldNames, ModelRecipe, Recipe, TrainRecipe, TuningRecipe

__all__ = [
    "BUDGETS", "DataRecipe", "ModelRecipe", "Recipe", "TrainRecipe", "TuningRecipe", "list_recipes", "load_recipe",
    "parse_recipe", "recipe_folder",
]  # fmt: skip


def recipe_folder() -> Path:
    """Where the recipes that come with the library are: in the package, or in the repository of an editable install."""
    package = Path(wkv.__file__).parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parents[1] / "recipes"


def list_recipes() -> list[str]:
    """Names that `load_recipe` knows."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a name from `list_recipes()` or the path of a YAML file.
        overrides: changes such as "train.steps=100" or "model.hidden_size=256".

    Raises:
        RecipeError: for a missing or broken file, unknown keys, wrong types and impossible values; it names the key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = _find(source)
    for override in overrides:
        if not override.partition("=")[1] or not override.partition("=")[0].strip():
            raise RecipeError(f"override {override!r}: expected key=value, such as train.steps=100")
    try:
        changes = OmegaConf.from_dotlist(list(overrides))
        merged = OmegaConf.merge(OmegaConf.load(path), changes)
        _replace_budget(merged, changes)
        values = OmegaConf.to_container(merged, resolve=False)
    except (YAMLError, OmegaConfBaseException, OSError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"recipe {path}: {_first_line(error)}") from error
    return parse_recipe(values)


def _replace_budget(merged: Any, changes: Any) -> None:
    """An override of one of steps, tokens and seconds takes the place of the one in the file."""
    train = changes.get("train")
    given = [key for key in BUDGETS if isinstance(train, Mapping) and train.get(key) is not None]
    for key in BUDGETS:
        if given and key not in given and key in merged.train:
            merged.train[key] = None


def parse_recipe(values: Any) -> Recipe:
    """A recipe from nested dictionaries in the layout of the YAML files; errors as for `load_recipe`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = _config_class(values)
    check_keys(values, _schema(config))
    try:
        filled = OmegaConf.to_container(OmegaConf.merge(_structured(config), OmegaConf.create(values)))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise RecipeError(f"{getattr(error, 'full_key', None) or 'recipe'}: {_first_line(error)}") from error
    assert isinstance(filled, dict)
    model = filled["model"]
    sizes = {key: value for key, value in model.items() if key not in ("name", "preset") and value is not None}
    recipe = Recipe(
        ModelRecipe(model["name"], model["preset"], sizes),
        DataRecipe(**{**filled["data"], "fields": FieldNames(**filled["data"]["fields"])}),
        TrainRecipe(**filled["train"]),
        TuningRecipe(**filled["tuning"]),
        filled["out"],
    )
    check_recipe(recipe)
    return recipe


def _config_class(values: Any) -> Any:
    """That of the model which `values` names."""
    name = "rwkv7"
    if isinstance(values, dict) and isinstance(values.get("model"), dict):
        name = values["model"].get("name", name)
    try:
        found = registry.entry(name if isinstance(name, str) else repr(name)).config_class
    except WkvError as error:
        raise RecipeError(f"model.name: {error}") from error
    return found


@functools.cache
def _structured(config: Any) -> Any:
    """The layout of recipes as OmegaConf has it; making it takes longer than everything else about a recipe."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(_schema(config))


@functools.cache
def _schema(config: Any) -> type[Any]:
    """The layout of recipes for a model: its configuration fields stand in `model`."""
    hints = typing.get_type_hints(config)
    sizes = [(f.name, typing.Optional[hints[f.name]], None) for f in dataclasses.fields(config) if f.init]  # noqa: UP045
    model = dataclasses.make_dataclass("Model", [("name", str, "rwkv7"), ("preset", str | None, None), *sizes])
    return dataclasses.make_dataclass(
        "Schema",
        [
            ("model", model, field(default_factory=model)),
            ("data", DataRecipe, field(default_factory=DataRecipe)),
            ("train", TrainRecipe, field(default_factory=TrainRecipe)),
            ("tuning", TuningRecipe, field(default_factory=TuningRecipe)),
            ("out", str | None, None),
        ],
    )


def _find(source: str | Path) -> Path:
    named = recipe_folder() / f"{source}.yaml"
    path = named if named.is_file() else Path(source)
    if not path.is_file():
        raise RecipeError(f"recipe {str(source)!r}: neither a YAML file nor one of {', '.join(list_recipes())}")
    return path


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:  # of the YAML parser
        return f"line {mark.line + 1}: {getattr(error, 'problem', None) or 'not YAML'}"
    return str(error).strip().partition("\n")[0] or type(error).__name__
