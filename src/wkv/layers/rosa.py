"""The ROSA layer of RWKV-8 (RWKV-LM, RWKV-v8): a memory of symbols that are signs of numbers. Experimental.

Queries, keys and values are linear in the shifted input; every channel is a bit (is it above 0?), and `bits`
neighbouring channels are a symbol. `wkv.ops.rosa` finds the value that followed the longest match; a channel's output
is e where its bit is 1, -e where it is 0, and 0 where nothing matched.

Bits have no derivative. In its place stands what the original's slow reference takes: the change of the loss, to first
order in the output, when the bit of one token is flipped, over 2 max(|x|, tau) for the number x that it is the sign of.
For queries and keys the search is repeated for every flipped bit: short sequences only.

Shape letters: B batch, T time, C channels, G = C / bits groups of channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wkv.errors import WkvError
from wkv.layers import initialisation as init
from wkv.layers.norms import wide
from wkv.layers.timeline import Timeline
from wkv.ops.rosa import RosaState, rosa
from wkv.state import LayerState

TAU = 1e-3
FLIPS = 1 << 22  # symbols of all the flipped sequences that are searched at once


class Rosa(nn.Module):
    """Token shift, three linear maps with biases, ROSA, one linear map.

    Args:
        hidden_size: C, a multiple of `bits`.
        bits: of a symbol: 1 to 8; the originals have 1 and 4.
        tau: least magnitude that gradients of bits are divided by.

    Raises:
        WkvError: for other sizes.
    """

    def __init__(self, hidden_size: int, bits: int = 1, tau: float = TAU) -> None:
        super().__init__()
        if not 1 <= bits <= 8 or hidden_size < 1 or hidden_size % bits:
            raise WkvError(f"hidden_size must be a multiple of bits, 1 to 8; found {hidden_size} and {bits}")
        self.bits, self.tau = bits, tau
        self.x_q, self.x_k, self.x_v = (init.blank(hidden_size) for _ in "qkv")
        self.query, self.key, self.value = (nn.Linear(hidden_size, hidden_size) for _ in "qkv")
        self.amount = init.blank(hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.reset_parameters()

    def forward(
        self, z_BTC: Tensor, state: LayerState | None = None, timeline: Timeline | None = None
    ) -> tuple[Tensor, LayerState]:
        """Normed input [B, T, C] -> output [B, T, C], the new state: `shift` [B, C] and the slots of `RosaState`.

        The state grows with every token. No gradients flow to earlier tokens but through `shift`.
        """
        timeline = timeline or Timeline()
        carried = state or {"shift": torch.zeros_like(z_BTC[:, 0])}
        shifted_BTC, last_BC = timeline.shift(z_BTC, carried["shift"])
        q, k, v = (
            linear(torch.lerp(z_BTC, shifted_BTC, x.to(z_BTC.dtype)))
            for linear, x in ((self.query, self.x_q), (self.key, self.x_k), (self.value, self.x_v))
        )
        earlier = None if state is None else RosaState(state["keys"], state["values"], state["lengths"])
        around = _Around(earlier, timeline.mask, timeline.reset)
        y_BTC, *slots = _Search.apply(q, k, v, self.amount, around, self.bits, self.tau)
        new = dict(zip(RosaState._fields, slots, strict=True))
        return self.output(y_BTC), {"shift": last_BC, **new}

    def reset_parameters(self) -> None:
        """Ours: half of the token before in queries, keys and values, torch's linear maps, amounts of 1."""
        for x in (self.x_q, self.x_k, self.x_v):
            nn.init.constant_(x, 0.5)
        for linear in (self.query, self.key, self.value, self.output):
            linear.reset_parameters()
        nn.init.ones_(self.amount)


def symbols(x_BTC: Tensor, bits: int) -> Tensor:
    """Bits of neighbouring channels, the first one the lowest: int64 [B, T, G]."""
    place = torch.arange(bits, device=x_BTC.device)
    return ((x_BTC > 0).unflatten(-1, (-1, bits)).long() << place).sum(-1)


def signs(found_BTG: Tensor, bits: int) -> Tensor:
    """Symbols, -1 for none -> 1, -1 and 0 for each bit, int64 [B, T, C]."""
    bit = found_BTG[..., None] >> torch.arange(bits, device=found_BTG.device) & 1
    return torch.where(found_BTG[..., None] < 0, 0, 2 * bit - 1).flatten(-2)


@dataclass(frozen=True)
class _Around:
    """What sequences of symbols stand in: what came before, which tokens exist, where documents begin."""

    earlier: RosaState | None
    mask: Tensor | None
    reset: Tensor | None

    def find(self, qkv: Sequence[Tensor]) -> tuple[Tensor, RosaState]:
        """What ROSA finds for symbols q, k, v [B, T, G], and the new state."""
        q, k, v = qkv
        found, _, state = rosa(q, k, v, self.earlier, mask=self.mask, reset=self.reset)
        return found, state

    def times(self, count: int) -> _Around:
        """For `count` copies of the batch, one behind the other."""
        earlier = None if self.earlier is None else RosaState(*(x.repeat(count, 1, 1) for x in self.earlier))
        mask, reset = (None if x is None else x.repeat(count, 1) for x in (self.mask, self.reset))
        return _Around(earlier, mask, reset)


class _Search(torch.autograd.Function):
    """ROSA on the signs of q, k, v [B, T, C], times e [C]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, amount: Tensor, around: _Around, bits: int, tau: float
    ) -> tuple[Tensor, ...]:
        found, state = around.find([symbols(x, bits) for x in (q, k, v)])
        ctx.save_for_backward(q, k, v, amount)
        ctx.rest = around, bits, tau
        ctx.mark_non_differentiable(*state)
        return (signs(found, bits) * amount).to(q.dtype), *state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, amount = ctx.saved_tensors
        around, bits, tau = ctx.rest
        dy = wide(gradients[0])
        given = [symbols(x, bits) for x in inputs]
        results: list[Tensor | None] = [None] * 4
        for place, x in enumerate(inputs):
            if ctx.needs_input_grad[place]:
                change = _changes(given, place, around, dy * wide(amount), bits)
                results[place] = (change / (2 * wide(x).abs().clamp_min(tau))).to(x.dtype)
        if ctx.needs_input_grad[3]:
            results[3] = (signs(around.find(given)[0], bits) * dy).sum((0, 1)).to(amount.dtype)
        return *results, None, None, None


def _changes(given: list[Tensor], place: int, around: _Around, weight_BTC: Tensor, bits: int) -> Tensor:
    """How much larger the sum of `weight` times the signs is with each bit of `given[place]` at 1 than with it at 0.

    A bit changes its own group of channels only: those of all groups are flipped at once. [B, T, C]
    """
    batch, time, groups = given[place].shape
    change_BTC = torch.empty_like(weight_BTC)
    for tokens in torch.arange(time, device=weight_BTC.device).split(max(1, FLIPS // (batch * time * groups))):
        count, flips = len(tokens), torch.arange(len(tokens), device=tokens.device)
        copies, weights = around.times(count), weight_BTC.repeat(count, 1, 1)
        for bit in range(bits):
            sums = []
            for value in (1, 0):
                flipped = given[place].repeat(count, 1, 1, 1)
                flipped[flips, :, tokens] = flipped[flips, :, tokens] & ~(1 << bit) | value << bit
                changed = [x.repeat(count, 1, 1) for x in given]
                changed[place] = flipped.flatten(0, 1)
                found, _ = copies.find(changed)
                sums.append((signs(found, bits) * weights).unflatten(-1, (-1, bits)).sum((1, 3)))
            change_BTC[:, tokens, bit::bits] = (sums[0] - sums[1]).unflatten(0, (count, batch)).transpose(0, 1)
    return change_BTC
