"""Word problems of groups: the groups are groups, and products are right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.synthetic.answers import IGNORED, asked, rows
from wkv.evaluation.synthetic import create_task
from wkv.evaluation.synthetic.groups import elements, multiplication_table

ORDERS = {"s3": 6, "s4": 24, "s5": 120, "a5": 60, "z60": 60, "a4xz5": 60}
COMMUTATOR_ORDERS = {"s3": [3, 1], "s4": [12, 4, 1], "s5": [60, 60], "a5": [60], "z60": [1], "a4xz5": [4, 1]}
all_groups = pytest.mark.parametrize("group", ORDERS)


@all_groups
def test_group_axioms(group: str) -> None:
    table, order = multiplication_table(group), ORDERS[group]
    assert table.shape == (order, order)
    everything = torch.arange(order)
    assert torch.equal(table[0], everything)
    assert torch.equal(table[:, 0], everything)
    assert torch.equal(table.sort(0).values, everything[:, None].expand(order, order))
    assert torch.equal(table.sort(1).values, everything.expand(order, order))
    assert torch.equal(table[table], table[:, table])  # (a b) c = a (b c)


@all_groups
def test_which_group_it_is(group: str) -> None:
    """Orders of the derived series: A5 and S5 never come to 1."""
    table = multiplication_table(group)
    inverses = (table == 0).int().argmax(1)
    current = set(range(ORDERS[group]))
    for expected in COMMUTATOR_ORDERS[group]:
        pairs = [(a, b) for a in current for b in current]
        a, b = torch.tensor(pairs).T
        current = _generated(set(table[table[inverses[a], inverses[b]], table[a, b]].tolist()), table)
        assert len(current) == expected


def _generated(some: set[int], table: torch.Tensor) -> set[int]:
    while True:
        members = torch.tensor(sorted(some))
        more = some | set(table[members][:, members].flatten().tolist())
        if more == some:
            return some
        some = more


@all_groups
@settings(max_examples=10, deadline=None)
@given(st.integers(2, 10), st.integers(0, 6), st.booleans(), st.integers(0, 9))
def test_products(group: str, low: int, more: int, bos: bool, seed: int) -> None:
    task = create_task(f"group_{group}", min_length=low, max_length=low + more, bos=bos)
    assert task.vocab_size == ORDERS[group] + bos
    samples = task.sample(4, seed)
    listed = elements(group)
    points = range(len(listed[0]))
    for (inputs, labels), length in zip(rows(samples), samples.meta["lengths"].tolist(), strict=True):
        assert len(inputs) == low + more
        assert asked(labels) == list(range(bos, length))
        assert not any(inputs[length:])
        if bos:
            assert inputs[0] == ORDERS[group]
            assert labels[0] == IGNORED
        where = list(points)  # where each point has been moved to
        for place in range(bos, length):
            where = [listed[inputs[place]][point] for point in where]
            assert listed[labels[place]] == tuple(where)


def test_numberings() -> None:
    assert elements("s3") == ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    table = multiplication_table("z60")
    assert table[59, 3] == 2
    assert all(sorted(one[:4]) == [0, 1, 2, 3] for one in elements("a4xz5"))
    assert multiplication_table("a4xz5")[7, 4] == 5 + (2 + 4) % 5
    # (0 1) first, then (1 2): 0 -> 1 -> 2
    assert multiplication_table("s3")[2, 1] == elements("s3").index((2, 0, 1))


@pytest.mark.parametrize(("group", "points", "number"), [("s5", 2, 11), ("s5", 3, 31), ("a5", 3, 21), ("s5", 5, 120)])
def test_generators(group: str, points: int, number: int) -> None:
    task = create_task(f"group_{group}", moved_points=points, min_length=9, max_length=9)
    assert len(set(task.sample(2000, 0).inputs.flatten().tolist())) == number


def test_chance() -> None:
    assert create_task("group_s5").chance == pytest.approx(1 / 120)
    task = create_task("group_s3", moved_points=2, min_length=4, max_length=4)
    labels = task.sample(20_000, 0, "test").labels
    found = sum(int(column.bincount().max()) for column in labels.T) / labels.numel()
    assert abs(found - task.chance) < 0.01
