"""What all samplers promise: exact resume, shares of ranks, refusal of other data."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wkv.data import (
    Batch,
    MagicPrimeWindows,
    PackedDocuments,
    PaddedDocuments,
    RandomWindows,
    Sampler,
    StreamingDocuments,
    TokenStore,
    UniformWindows,
)
from wkv.errors import DataError

SAMPLERS: dict[str, Callable[..., Any]] = {
    "uniform": partial(UniformWindows, seed=3),
    "magic prime": MagicPrimeWindows,
    "packed": partial(PackedDocuments, seed=3),
    "packed without reset": partial(PackedDocuments, seed=3, reset=False),
    "padded": partial(PaddedDocuments, seed=3),
    "streaming": StreamingDocuments,
    "streaming shuffled": partial(StreamingDocuments, seed=3),
}
every_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)


def a_store(lengths: list[int], masked: bool = False) -> TokenStore:
    """Every token is its own place."""
    ends = np.cumsum(lengths, dtype=np.int64)
    mask = np.arange(ends[-1]) % 3 != 1 if masked else None
    return TokenStore(np.arange(ends[-1], dtype=np.int32), ends - lengths, mask)


STORE = a_store([5, 0, 1, 17, 3, 9, 2, 30, 4, 4], masked=True)
stores = st.builds(
    a_store, st.lists(st.integers(0, 12), min_size=4, max_size=12).map(lambda x: [30, *x]), st.booleans()
)


def values(batch: Batch) -> dict[str, Any]:
    return {name: None if value is None else value.tolist() for name, value in vars(batch).items()}


@every_sampler
@given(store=stores, context=st.integers(1, 9), rows=st.integers(1, 4), before=st.integers(0, 12))
def test_a_resumed_sampler_goes_on_exactly(
    make: Callable[..., Any], store: TokenStore, context: int, rows: int, before: int
) -> None:
    uninterrupted, resumed = (make(store, context_length=context, batch_size=rows) for _ in range(2))
    assert isinstance(uninterrupted, Sampler)
    for _ in range(before):
        uninterrupted.next_batch()
    file = io.BytesIO()
    torch.save(uninterrupted.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(4):
        assert values(uninterrupted.next_batch()) == values(resumed.next_batch())


@every_sampler
@pytest.mark.parametrize(("ranks", "rows"), [(2, 3), (3, 2), (6, 1)])
def test_ranks_share_the_batch_of_one_process(make: Callable[..., Any], ranks: int, rows: int) -> None:
    whole = make(STORE, context_length=4, batch_size=6)
    parts = [make(STORE, context_length=4, batch_size=rows, rank=rank, world_size=ranks) for rank in range(ranks)]
    for _ in range(7):
        expected, shares = whole.next_batch(), [part.next_batch() for part in parts]
        for row in range(6):
            share, at = shares[row % ranks], row // ranks
            width = share.inputs.shape[1]  # padded documents are padded to the longest of a share
            assert torch.equal(share.inputs[at], expected.inputs[row, :width])
            assert torch.equal(share.targets[at], expected.targets[row, :width])
            for name in ("loss_mask", "reset", "mask"):
                ours, theirs = getattr(share, name), getattr(expected, name)
                assert (ours is None) == (theirs is None)
                assert ours is None or torch.equal(ours[at], theirs[row, :width])
    assert parts[0].state_dict()["step"] == parts[-1].state_dict()["step"] == 7
    whole.load_state_dict(parts[-1].state_dict())  # the number of ranks may change
    assert whole.state_dict()["step"] == 7


@every_sampler
def test_other_data_and_settings_are_refused(make: Callable[..., Any]) -> None:
    sampler = make(STORE, context_length=4, batch_size=2)
    state = sampler.state_dict()
    with pytest.raises(DataError, match="training text or its tokenizer has changed"):
        make(a_store([30, 4]), context_length=4, batch_size=2).load_state_dict(state)
    with pytest.raises(DataError, match="context_length was 4 in the checkpoint and is now 5"):
        make(STORE, context_length=5, batch_size=2).load_state_dict(state)
    with pytest.raises(DataError, match="rows was 2 in the checkpoint and is now 4"):
        make(STORE, context_length=4, batch_size=2, world_size=2).load_state_dict(state)
    with pytest.raises(DataError, match=f"made with another sampler, not {type(sampler).__name__}"):
        sampler.load_state_dict(RandomWindows(torch.arange(99), 4, 2, 1).state_dict())
    if "seed" in state["settings"]:
        settings = {**state["settings"], "seed": 4}
        with pytest.raises(DataError, match="seed was 4 in the checkpoint and is now"):
            sampler.load_state_dict({**state, "settings": settings})
    assert sampler.state_dict()["step"] == 0


@every_sampler
def test_impossible_arguments(make: Callable[..., Any]) -> None:
    for change in ({"context_length": 0}, {"batch_size": True}, {"batch_size": 2.0}, {"world_size": 0}):
        with pytest.raises(DataError, match="must be a positive integer"):
            make(STORE, **{"context_length": 4, "batch_size": 2, **change})
    for rank in (-1, 1, True):
        with pytest.raises(DataError, match=r"rank must be in 0 \.\. world_size - 1 = 0"):
            make(STORE, context_length=4, batch_size=2, rank=rank)


def test_batches() -> None:
    windows = torch.arange(10).reshape(2, 5)
    batch = Batch.from_windows(windows)
    assert batch.num_targets == 8
    counted = Batch(batch.inputs, batch.targets, batch.targets > 3, mask=batch.inputs > 3)
    assert counted.num_targets == 5
    moved = counted.to("cpu")
    assert torch.equal(moved.inputs, windows[:, :-1])
    assert (moved.reset, moved.mask is None) == (None, False)
    for wrong in (
        {"targets": windows},
        {"inputs": windows[0]},
        {"reset": batch.inputs},
        {"targets": batch.targets.int()},
    ):
        with pytest.raises(DataError, match="of a batch must be"):
            Batch(**{"inputs": batch.inputs, "targets": batch.targets, **wrong})
