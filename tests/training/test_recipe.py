"""Recipes: the ones that come with the library, overrides, and 80 malformed ones."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from wkv.errors import RecipeError
from wkv.training import list_recipes, load_recipe, parse_recipe

from .helpers import recipe_values


def test_all_shipped_recipes_are_valid() -> None:
    assert {"demo", "tiny", "minipile-0.1b"} <= set(list_recipes())
    for name in list_recipes():
        assert load_recipe(name).out == f"runs/{name}"


def test_the_official_run() -> None:
    recipe = load_recipe("minipile-0.1b")
    assert recipe.model.sizes["num_layers"], recipe.model.sizes["hidden_size"] == (12, 768)
    train = recipe.train
    assert (train.learning_rate, train.final_learning_rate, train.warmup_steps) == (6e-4, 6e-5, 10)
    assert (train.weight_decay, train.betas, train.eps, train.tokens) == (0.001, [0.9, 0.99], 1e-18, 1498226207)


def test_overrides_change_values_of_the_right_type() -> None:
    changes = ["model.hidden_size=64", "train.learning_rate=1e-3", "data.source=a b.txt", "train.betas=[0.9,0.95]"]
    recipe = load_recipe("demo", changes)
    assert recipe.model.sizes["hidden_size"] == 64
    assert recipe.train.learning_rate == 1e-3
    assert recipe.data.source == "a b.txt"
    assert recipe.train.betas == [0.9, 0.95]


def test_an_overridden_budget_replaces_that_of_the_file() -> None:
    train = load_recipe("demo", ["train.steps=50"]).train
    assert (train.steps, train.seconds, train.tokens) == (50, None, None)


def test_a_recipe_survives_writing_and_reading(tmp_path: Path) -> None:
    for name in list_recipes():
        recipe = load_recipe(name)
        OmegaConf.save(OmegaConf.create(recipe.to_dict()), tmp_path / "recipe.yaml")
        assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1, 2", "expected"),
        ("- a\n- b\n", "must be a mapping|cannot merge|Cannot merge"),
        ("train:\n", "train must be a mapping"),
        ("train: {steps: 5}\ntrain: {steps: 6}\n", "duplicate"),
        ("\x00", "recipe"),
        ("", "give one of train.steps|model"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_unknown_recipes_and_overrides() -> None:
    with pytest.raises(RecipeError, match=r"'nothing'.*demo.*tiny"):
        load_recipe("nothing")
    with pytest.raises(RecipeError, match="expected key=value"):
        load_recipe("demo", ["train.steps"])
    with pytest.raises(RecipeError, match="did you mean learning_rate"):
        load_recipe("demo", ["train.learningrate=1"])


POSITIVE_INTEGERS = ["train.context_length", "train.batch_size", "train.eval_every", "train.checkpoint_every"]
NUMBERS = ["train.learning_rate", "train.weight_decay", "train.clip", "train.l2wrap", "data.held_out_fraction"]


def put(values: dict[str, Any], key: str, value: Any) -> str:
    section, name = key.split(".")
    values[section][name] = value
    return key


def unknown_key(values: dict[str, Any], rng: random.Random) -> str:
    return put(values, f"{rng.choice(['model', 'data', 'train'])}.{rng.choice(['lr', 'n_embd', 'dropout', 'x'])}", 1)


def wrong_type(values: dict[str, Any], rng: random.Random) -> str:
    key = rng.choice([*POSITIVE_INTEGERS, *NUMBERS, "model.num_layers", "model.head_size", "model.decay_rank"])
    return put(values, key, rng.choice(["many", [1], {"a": 1}, True, "${train.seed}", "???"]))


def fractional_count(values: dict[str, Any], rng: random.Random) -> str:
    return put(values, rng.choice([*POSITIVE_INTEGERS, "model.hidden_size", "train.steps"]), rng.random() + 1)


def out_of_range(values: dict[str, Any], rng: random.Random) -> str:
    key = rng.choice([*POSITIVE_INTEGERS, *NUMBERS, "train.steps", "train.eval_bytes", "train.eps"])
    return put(values, key, -rng.randint(1, 9))


def not_a_number(values: dict[str, Any], rng: random.Random) -> str:
    return put(
        values, rng.choice(["train.learning_rate", "train.clip", "train.eps"]), rng.choice([float("nan"), float("inf")])
    )


def missing_value(values: dict[str, Any], rng: random.Random) -> str:
    return put(values, rng.choice(["data.source", "train.seed", "train.batch_size", "train.precision"]), None)


def unknown_choice(values: dict[str, Any], rng: random.Random) -> str:
    key, value = rng.choice([("train.precision", "fp16"), ("train.schedule", "step"), ("model.name", "rwkv9")])
    return put(values, key, value)


def bad_betas(values: dict[str, Any], rng: random.Random) -> str:
    return put(values, "train.betas", rng.choice([[0.9], [0.9, 1.0], [-0.1, 0.9], 0.9, ["a", "b"], [0.9, 0.9, 0.9]]))


def no_section(values: dict[str, Any], rng: random.Random) -> str:
    section = rng.choice(["model", "data", "train"])
    values[section] = rng.choice([None, 3, "x", []])
    return section


def bad_budget(values: dict[str, Any], rng: random.Random) -> str:
    key, value = rng.choice([("train.steps", None), ("train.tokens", 100), ("train.seconds", 5)])
    put(values, key, value)
    return "train.steps"


def bad_combination(values: dict[str, Any], rng: random.Random) -> str:
    key, value, named = rng.choice(
        [
            ("train.warmup_steps", 20, "train.warmup_steps"),
            ("data.tokenizer", "bpe", "data.vocab_size"),
            ("data.vocab_size", 500, "data.vocab_size"),
            ("model.head_size", 7, "head_size"),
            ("model.preset", "9b", "preset"),
            ("model.hidden_size", None, "hidden_size"),
            ("model.num_layers", 0, "num_layers"),
        ]
    )
    put(values, key, value)
    return named


MUTATIONS: list[Callable[[dict[str, Any], random.Random], str]] = [
    unknown_key, wrong_type, fractional_count, out_of_range, not_a_number, missing_value, unknown_choice, bad_betas,
    no_section, bad_budget, bad_combination,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(80))
def test_malformed_recipes_are_refused_by_key_and_nothing_is_written(seed: int, tmp_path: Path) -> None:
    from wkv.cli import app

    rng = random.Random(seed)
    values = copy.deepcopy(recipe_values(tmp_path / "corpus"))
    key = MUTATIONS[seed % len(MUTATIONS)](values, rng)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
    OmegaConf.save(OmegaConf.create(values), tmp_path / "bad.yaml")
    outcome = CliRunner().invoke(app, ["train", "--recipe", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "run")])
    assert isinstance(outcome.exception, RecipeError)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]
