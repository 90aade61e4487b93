"""Lines with entries at chunk ends, against the plainest way to write them."""

from __future__ import annotations

import torch
from torch import Tensor

from wkv.layers.state_tokens import Chunks, tokens_read
from wkv.layers.timeline import Timeline
from wkv.state import LayerState

LENGTH, PERIOD, ENTRIES = 17, 3, 2
COUNTS = torch.tensor([0, 1, 5 + 2, 2 * 5])  # tokens and entries of 0, 1, 5 and 6 tokens


def timeline(seed: int) -> Timeline:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(COUNTS), LENGTH, generator=generator) < 0.7
    return Timeline.build(mask, torch.rand(len(COUNTS), LENGTH, generator=generator) < 0.1)


def written(order: Timeline, row: int) -> list[tuple[int, int]]:
    """The line of one row as (token, -1) and, after the last token of a chunk, (token, 0), (token, 1)."""
    read, line = int(tokens_read(COUNTS, PERIOD, ENTRIES)[row]), []
    for t in range(LENGTH):
        if order.mask is not None and not order.mask[row, t]:
            continue
        read = 0 if order.reset is not None and order.reset[row, t] else read
        line.append((t, -1))
        read += 1
        if read % PERIOD == 0:
            line += [(t, entry) for entry in range(ENTRIES)]
    return line


def test_counts() -> None:
    assert tokens_read(COUNTS, PERIOD, ENTRIES).tolist() == [0, 1, 5, 6]


def test_entries_stand_behind_the_tokens_that_complete_a_chunk() -> None:
    for order in (Timeline(), timeline(0), timeline(1)):
        chunks = Chunks.build(COUNTS, order, LENGTH, PERIOD, ENTRIES)
        pieces = chunks.starts.shape[1] - 1
        token = torch.arange(LENGTH).expand(len(COUNTS), -1)
        tokens = torch.stack([token, torch.full_like(token, -1)], -1)[:, :, None].float()
        real = torch.ones_like(token, dtype=torch.bool) if order.mask is None else order.mask
        in_piece = (chunks.piece[..., None] == torch.arange(pieces)) & real[..., None]
        last = torch.where(in_piece, token[..., None], -1).amax(1)
        entries = torch.stack(
            [last.repeat_interleave(ENTRIES, 1), torch.arange(ENTRIES).repeat(len(COUNTS), pieces)], -1
        )
        line = chunks.merge(tokens, entries[:, :, None].float())
        for row in range(len(COUNTS)):
            assert chunks.line.mask is not None
            found = [tuple(map(int, pair)) for pair in line[row, chunks.line.mask[row], 0]]
            assert found == written(order, row)
        torch.testing.assert_close(chunks.tokens_of(line), tokens)


def test_a_recurrence_in_pieces_is_the_recurrence() -> None:
    """Here a running sum, which is what the state and the output are."""
    order = timeline(2)
    chunks = Chunks.build(COUNTS, order, LENGTH, PERIOD, ENTRIES)
    x = torch.rand(len(COUNTS), LENGTH, 1, 1, dtype=torch.float64)

    def total(inputs: list[Tensor], state: LayerState, part: Timeline) -> tuple[Tensor, LayerState]:
        assert part.mask is not None
        assert part.reset is not None
        sums, now = [], state["wkv"]
        for t in range(inputs[0].shape[1]):
            now = torch.where(part.reset[:, t, None, None, None], 0.0, now)
            now = now + torch.where(part.mask[:, t, None, None, None], inputs[0][:, t, ..., None], 0.0)
            sums.append(now.squeeze(-1))
        return torch.stack(sums, 1), {"wkv": now}

    start = {"wkv": torch.ones(len(COUNTS), 1, 1, 1, dtype=torch.float64), "other": torch.zeros(1)}
    y, slots, ends = chunks.remember(total, [x], start)
    wanted, last = total([x], start, order)
    assert order.mask is not None
    torch.testing.assert_close(y[order.mask], wanted[order.mask])
    torch.testing.assert_close(slots["wkv"], last["wkv"])
    for row, piece in ((0, 0), (2, 1), (3, 2)):
        inside = order.mask[row] & (chunks.piece[row] <= piece)
        torch.testing.assert_close(ends[row, piece].flatten(), wanted[row][inside][-1].flatten())
