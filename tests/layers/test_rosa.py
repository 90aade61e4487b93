"""ROSA: the golden vectors, a search by hand, states, masks and resets; the layer and its gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wkv.errors import WkvError
from wkv.layers.rosa import Rosa, signs, symbols
from wkv.layers.timeline import Timeline
from wkv.ops import rosa
from wkv.ops.rosa import RosaState

CASES = json.loads((Path(__file__).parents[1] / "golden/rwkv8_rosa/cases.json").read_text())


def line(values: list[int]) -> Tensor:
    return torch.tensor(values)[None, :, None]


def by_hand(q: list[int], k: list[int], v: list[int]) -> tuple[list[int], list[int]]:
    """All suffixes, longest first, at all places, latest first."""
    found, lengths = [], []
    for t in range(len(q)):
        hit = next(
            ((v[end + 1], size) for size in range(t, 0, -1) for end in range(t - 1, size - 2, -1)
             if q[t + 1 - size : t + 1] == k[end + 1 - size : end + 1]), (-1, 0),
        )  # fmt: skip
        found.append(hit[0])
        lengths.append(hit[1])
    return found, lengths


def random_symbols(batch: int = 2, time: int = 12, channels: int = 3, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randint(2, (batch, time, channels)) for _ in "qkv"]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_golden(number: int) -> None:
    case = CASES[number]
    if case["kind"] == "rosa":
        found, _, _ = rosa(*[line(case["x"])] * 3)
        assert found.flatten().tolist() == case["y"]
        return
    found, lengths, _ = rosa(*(line(case[name]) for name in "qkv"))
    assert torch.where(lengths > 0, found, 0).flatten().tolist() == case["y"]
    assert lengths.flatten().tolist() == case["match_len"]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=20))
def test_equals_a_search_by_hand(tokens: list[tuple[int, int, int]]) -> None:
    q, k, v = ([token[i] for token in tokens] for i in range(3))
    found, lengths, _ = rosa(line(q), line(k), line(v))
    assert (found.flatten().tolist(), lengths.flatten().tolist()) == by_hand(q, k, v)


@pytest.mark.parametrize("cuts", [(5,), (1, 2, 11), tuple(range(1, 12))])
def test_in_pieces(cuts: tuple[int, ...]) -> None:
    given_symbols = random_symbols()
    whole = rosa(*given_symbols)
    state: RosaState | None = None
    parts = []
    for piece in zip(*(x.tensor_split(cuts, 1) for x in given_symbols), strict=True):
        *results, state = rosa(*piece, state)
        parts.append(results)
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts], 1), whole[i])
    assert state is not None
    assert all(torch.equal(a, b) for a, b in zip(state, whole[2], strict=True))


def test_a_token_that_does_not_exist_is_as_if_it_were_not_there() -> None:
    given_symbols = random_symbols()
    torch.manual_seed(1)
    mask = torch.rand(2, 12) > 0.4
    mask[:, 5] = False
    state: RosaState | None = None
    parts = []
    for piece in zip(*(x.split(4, 1) for x in (*given_symbols, mask)), strict=True):
        *results, state = rosa(*piece[:3], state, mask=piece[3])
        parts.append(results)
    for b in range(2):
        q, k, v = (x[b : b + 1, mask[b]] for x in given_symbols)
        expected = rosa(q, k, v)
        for i in range(2):
            assert torch.equal(torch.cat([part[i] for part in parts], 1)[b, mask[b]], expected[i][0])
    assert bool((torch.cat([part[0] for part in parts], 1)[~mask] == -1).all())


def test_documents_do_not_see_each_other() -> None:
    given_symbols = random_symbols()
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 4], reset[1, 9] = True, True
    found, lengths, state = rosa(*given_symbols, reset=reset)
    for b, start in ((0, 4), (1, 9)):
        for piece in (slice(0, start), slice(start, None)):
            expected = rosa(*(x[b : b + 1, piece] for x in given_symbols))
            assert torch.equal(found[b : b + 1, piece], expected[0])
            assert torch.equal(lengths[b : b + 1, piece], expected[1])
    later = random_symbols(time=5, seed=2)
    after = rosa(*later, state)[0]
    for b, start in ((0, 4), (1, 9)):
        whole = [torch.cat([x[b : b + 1, start:], y[b : b + 1]], 1) for x, y in zip(given_symbols, later, strict=True)]
        assert torch.equal(after[b : b + 1], rosa(*whole)[0][:, -5:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3)}, r"q must be \[B, T, C\]"),
        ({"k": torch.zeros(1, 3, 1, dtype=torch.int64)}, "k has shape"),
        ({"v": torch.zeros(1, 4, 2)}, "v must be int64"),
        ({"k": torch.full((1, 4, 2), -1)}, "symbols of k must be 0 or more, found -1"),
        ({"mask": torch.ones(1, 4)}, "mask must be bool"),
        ({"state": RosaState(*[torch.zeros(2, 1, 2, dtype=torch.int64)] * 3)}, "state.keys has shape"),
        ({"state": RosaState(*(torch.zeros(1, n, 2, dtype=torch.int64) for n in (2, 1, 2)))}, "state.values has shape"),
        ({"state": RosaState(*[torch.zeros(1, 1, 2)] * 3)}, "state.keys must be int64"),
    ],
)
def test_bad_arguments(change: dict[str, Tensor], message: str) -> None:
    arguments = {name: torch.zeros(1, 4, 2, dtype=torch.int64) for name in "qkv"}
    with pytest.raises(WkvError, match=message):
        rosa(**{**arguments, **change})


# ---- the layer ----


def layer(bits: int, size: int = 8) -> Rosa:
    torch.manual_seed(0)
    return Rosa(size, bits)


def test_bits_and_signs() -> None:
    x = torch.tensor([1.0, -1.0, 0.0, 2.0, 3.0, 1.0, -2.0, -0.5]).view(1, 1, 8)
    assert symbols(x, 4).tolist() == [[[9, 3]]]
    assert torch.equal(signs(symbols(x, 4), 4), torch.where(x > 0, 1, -1))
    assert not signs(torch.full((1, 1, 2), -1), 4).any()


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_in_pieces(bits: int, dtype: torch.dtype) -> None:
    model = layer(bits).to(dtype)
    z = torch.randn(2, 10, 8).to(dtype)
    with torch.no_grad():
        whole, end = model(z)
        state, parts = None, []
        for piece in z.split([3, 1, 6], 1):
            y, state = model(piece, state)
            parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert state is not None
    assert all(torch.equal(end[name], state[name]) for name in end)
    assert whole.dtype == dtype


def test_layer_with_masks_and_resets() -> None:
    model = layer(4)
    z = torch.randn(1, 9, 8)
    mask, reset = torch.ones(1, 9, dtype=torch.bool), torch.zeros(1, 9, dtype=torch.bool)
    mask[0, [0, 4]], reset[0, 6] = False, True
    with torch.no_grad():
        y, _ = model(z, timeline=Timeline.build(mask, reset))
        first, _ = model(z[:, [1, 2, 3, 5]])
        second, _ = model(z[:, 6:])
    assert torch.allclose(y[:, [1, 2, 3, 5, 6, 7, 8]], torch.cat([first, second], 1), atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2])
def test_gradients_are_those_of_flipped_bits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bit set and cleared by itself, the whole layer run again; of the amounts those of autograd."""
    from wkv.layers import rosa as module

    monkeypatch.setattr(module, "FLIPS", 40)  # in several rounds
    torch.manual_seed(0)
    inputs = [torch.randn(1, 6, 4, dtype=torch.float64).requires_grad_() for _ in "qkv"]
    amount = torch.rand(4, dtype=torch.float64).requires_grad_()
    earlier = rosa(*random_symbols(1, 3, 4 // bits))[2]
    around = module._Around(earlier, None, None)
    dy = torch.randn(1, 6, 4, dtype=torch.float64)

    def run(*x: Tensor) -> Tensor:
        y: Tensor = module._Search.apply(*x, amount, around, bits, 1e-3)[0]
        return y

    run(*inputs).backward(dy)
    for place, x in enumerate(inputs):
        expected = torch.zeros_like(x)
        for index in torch.cartesian_prod(torch.tensor([0]), torch.arange(6), torch.arange(4)):
            losses = []
            for value in (1.0, -1.0):
                changed = [other.detach().clone() for other in inputs]
                changed[place][tuple(index)] = value
                losses.append((run(*changed) * dy).sum())
            expected[tuple(index)] = (losses[0] - losses[1]).detach() / (2 * x[tuple(index)].abs().clamp_min(1e-3))
        assert x.grad is not None
        assert torch.allclose(x.grad, expected)
    found = rosa(*(symbols(x, bits) for x in inputs), earlier)[0]
    assert amount.grad is not None
    assert torch.allclose(amount.grad, (signs(found, bits) * dy).sum((0, 1)))


def test_layer_refuses() -> None:
    for size, bits in ((6, 4), (8, 0), (8, 9)):
        with pytest.raises(WkvError, match="multiple of bits"):
            Rosa(size, bits)
