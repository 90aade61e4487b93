"""Copying and reversing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.synthetic.answers import asked, rows
from wkv.errors import WkvError
from wkv.evaluation.synthetic import create_task


@pytest.mark.parametrize(("name", "separator", "step"), [("copying", 14, 1), ("digit_reversal", 10, -1)])
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(0, 6), st.integers(0, 9))
def test_answers(name: str, separator: int, step: int, low: int, more: int, seed: int) -> None:
    samples = create_task(name, min_symbols=low, max_symbols=low + more).sample(6, seed)
    assert samples.inputs.shape == (6, 2 * (low + more))
    for (inputs, labels), length in zip(rows(samples), samples.meta["lengths"].tolist(), strict=True):
        count = inputs.index(separator)
        assert length == 2 * count
        assert low <= count <= low + more
        answer = inputs[:count][::step]
        assert asked(labels) == list(range(count, length))
        assert labels[count:length] == answer
        assert inputs[count + 1 : length] == answer[:-1]
        assert set(inputs[length:]) <= {separator + 1}
        if name == "digit_reversal":
            assert inputs[0] != 0


def test_odd_lengths_do_not_exist() -> None:
    with pytest.raises(WkvError, match=r"copying: length must be even .* found 7"):
        create_task("copying").sample(2, 0, length=7)


def test_chance_of_reversed_numbers() -> None:
    task = create_task("digit_reversal", min_symbols=2, max_symbols=2)
    assert task.chance == pytest.approx((1 / 10 + 1 / 9) / 2)
    assert create_task("copying", vocab_size=10).chance == 1 / 8
