"""Arithmetic against Python's own, and the stated chance."""

from __future__ import annotations

import ast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.synthetic.answers import accuracy_of_constants, asked, rows
from wkv.evaluation.synthetic import create_task

SIGNS = {"modular_arithmetic": " +-*=01234", "modular_arithmetic_brackets": " +-*=()01234"}
both = pytest.mark.parametrize("name", SIGNS)


@both
@settings(max_examples=15, deadline=None)
@given(st.integers(3, 30), st.integers(0, 20), st.integers(0, 9))
def test_values(name: str, low: int, more: int, seed: int) -> None:
    signs = SIGNS[name]
    task = create_task(name, min_length=low, max_length=low + more)
    samples = task.sample(8, seed)
    assert samples.inputs.shape == (8, low + more)
    for (inputs, labels), length in zip(rows(samples), samples.meta["lengths"].tolist(), strict=True):
        assert low - (name == "modular_arithmetic") <= length <= low + more
        text = "".join(signs[token] for token in inputs)
        assert text[length - 2] == "="
        assert text[length - 1 :].strip() == ""
        assert asked(labels) == [length - 1]
        assert int(signs[labels[length - 1]]) == _value(text[: length - 2]) % 5


def _value(text: str) -> int:
    """Of an expression, which must be one."""
    tree = ast.parse(text, mode="eval")
    kinds = ast.Expression | ast.BinOp | ast.UnaryOp | ast.Constant | ast.operator | ast.USub
    assert all(isinstance(node, kinds) for node in ast.walk(tree))
    found = eval(compile(tree, "", "eval"))
    assert isinstance(found, int)
    return found


def test_every_form_occurs() -> None:
    signs = SIGNS["modular_arithmetic_brackets"]
    samples = create_task("modular_arithmetic_brackets", min_length=21, max_length=21).sample(2000, 0)
    texts = ["".join(signs[token] for token in inputs) for inputs, _ in rows(samples)]
    assert len(set(texts)) > 1990
    assert all(any(part in text for text in texts) for part in ("((", "))", "(-", "*(-", "--", "+", "*"))


@both
@pytest.mark.parametrize("length", [3, 5, 7, 9, 12, 15])
def test_chance(name: str, length: int) -> None:
    task = create_task(name, min_length=length, max_length=length)
    assert abs(accuracy_of_constants(task.sample(20_000, 0, "test"), task.vocab_size) - task.chance) < 0.015


def test_originals_are_answered_by_the_same_rules() -> None:
    samples = create_task("modular_arithmetic", max_length=31).sample(50, 3, compat="xlstm")
    for inputs, labels in rows(samples):
        (end,) = asked(labels)
        text = "".join(SIGNS["modular_arithmetic"][token] for token in inputs[: end - 1])
        assert labels[end] - 5 == _value(text) % 5
    assert not torch.equal(samples.inputs, create_task("modular_arithmetic", max_length=31).sample(50, 3).inputs)
