"""Recurrent softmax attention against the formula, written out token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wkv.layers import attention
from wkv.layers.attention import attend, empty_cache, positions, rotate
from wkv.layers.timeline import Timeline

B, T, H, N = 2, 31, 2, 4


def inputs(length: int = T, key_heads: int = H, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads = (H, key_heads, key_heads)
    q, k, v = (torch.randn(B, length, h, N, dtype=torch.float64, generator=generator) for h in heads)
    return q, k, v


def empty(heads: int = H) -> dict[str, Tensor]:
    return empty_cache(B, heads, N, torch.empty(0, dtype=torch.float64))


def formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, reset: Tensor, window: int | None) -> Tensor:
    """Every query of one row and head with a list of what it can see."""
    y = torch.zeros_like(q)
    for b in range(B):
        seen: list[int] = []
        for t in range(q.shape[1]):
            if not mask[b, t]:
                continue
            seen = [t] if reset[b, t] else [*seen, t]
            near = seen if window is None else seen[-window - 1 :]
            for h in range(H):
                of = h * k.shape[2] // H
                weights = torch.softmax(k[b, near, of] @ q[b, t, h] * N**-0.5, 0)
                y[b, t, h] = weights @ v[b, near, of]
    return y


def flags(kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mask, reset = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    if "masks" in kind:
        mask = torch.rand(B, T, generator=generator) < 0.7
    if "resets" in kind:
        reset = torch.rand(B, T, generator=generator) < 0.15
    return mask, reset


@pytest.mark.parametrize("kind", ["plain", "masks", "resets", "masks and resets"])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("key_heads", [1, H])
def test_is_the_formula_in_any_pieces(kind: str, window: int | None, key_heads: int) -> None:
    (q, k, v), (mask, reset) = inputs(key_heads=key_heads), flags(kind)
    expected = formula(q, k, v, mask, reset, window)
    for cuts in ([T], [1] * T, [7, 1, 13, 10]):
        state, parts, start = empty(key_heads), [], 0
        for size in cuts:
            part = slice(start, start + size)
            given = (mask[:, part] if "masks" in kind else None, reset[:, part] if "resets" in kind else None)
            y, state = attend(q[:, part], k[:, part], v[:, part], state, Timeline.build(*given), window)
            parts.append(y)
            start += size
        found = torch.cat(parts, 1)
        assert found.isfinite().all()
        torch.testing.assert_close(found[mask], expected[mask], atol=1e-12, rtol=1e-12)
        assert state["key_cache"].shape[1] <= min(T, T if window is None else window)


def test_queries_in_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, k, v), (mask, reset) = inputs(), flags("masks and resets")
    timeline = Timeline.build(mask, reset)
    expected, _ = attend(q, k, v, empty(), timeline)
    monkeypatch.setattr(attention, "QUERIES", 4)
    found, _ = attend(q, k, v, empty(), timeline)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("window", [None, 3])
def test_the_cache_holds_the_last_tokens_and_zeros_before_them(window: int | None) -> None:
    _, k, v = inputs()
    mask = torch.arange(T) < torch.tensor([[T], [2]])
    _, state = attend(k, k, v, empty(), Timeline.build(mask, None), window)
    size = T if window is None else window
    assert state["count"].tolist() == [T, 2]
    assert torch.equal(state["key_cache"][0], k[0, T - size :])
    assert torch.equal(state["value_cache"][1, -2:], v[1, :2])
    assert not state["key_cache"][1, :-2].any()


def test_positions_count_the_tokens_of_a_document() -> None:
    mask = torch.tensor([[True, False, True, True, False, True, True]])
    reset = torch.tensor([[False, False, False, True, False, False, True]])
    count = torch.tensor([10])
    assert positions(count, Timeline.build(mask, None), 7)[mask].tolist() == [10, 11, 12, 13, 14]
    assert positions(count, Timeline.build(mask, reset), 7)[mask].tolist() == [10, 11, 0, 1, 0]
    assert positions(count, Timeline.build(None, reset), 7).tolist() == [[10, 11, 12, 0, 1, 2, 0]]


def test_rotated_products_depend_on_distances_alone() -> None:
    q, k, _ = inputs(2)
    places = torch.tensor([[0, 3], [5, 70_000]])
    near = (rotate(q, places) * rotate(k, places + 4)).sum(-1)
    far = (rotate(q, places + 100_000) * rotate(k, places + 100_004)).sum(-1)
    torch.testing.assert_close(near, far, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(rotate(q, torch.zeros(B, 2, dtype=torch.int64)), q)
