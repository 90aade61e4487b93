"""Sums of states: mixtures of what was tuned or read, and differences between them.

A model answers to a mixture, not with one: two tuned behaviours rarely blend, the result tends to follow one of them.

RWKV-4 keeps num and den under a common factor exp(max). States are brought to the largest max first, so that what adds
up are the numerators and denominators themselves, weighted. A difference can have den <= 0: it is no state to start
from, but may be added to another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wkv.errors import WkvError
from wkv.layers.norms import wide
from wkv.state import LayerState, State, check_compatible


def mix(parts: Sequence[tuple[State, float]]) -> State:
    """The weighted sum of states.

    Args:
        parts: (state, weight) pairs; states of one model, batch size and device. Weights need not add up to 1.

    Returns:
        the sum, in the types of the first state.

    Raises:
        WkvError: if there are none, if they do not fit together, or if a weight is not finite.
    """
    if not parts:
        raise WkvError("mix needs at least one pair (state, weight)")
    first = parts[0][0]
    for state, weight in parts:
        check_compatible(state, first, first.device, first.batch_size)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise WkvError(f"weights must be finite numbers, found {weight!r}")
    weights = [weight for _, weight in parts]
    columns = zip(*(state.layers for state, _ in parts), strict=True)
    return State(first.model, [_sum(layers, weights) for layers in columns])


def interpolate(a: State, b: State, t: float) -> State:
    """(1 - t) a + t b: `a` for t = 0, `b` for t = 1; t may lie outside. See `mix` for errors."""
    return mix([(a, 1 - t), (b, t)])


def subtract(a: State, b: State) -> State:
    """a - b, such as what tuning has changed; add it to another state with `mix`, which also tells the errors."""
    return mix([(a, 1), (b, -1)])


def _sum(layers: Sequence[LayerState], weights: Sequence[float]) -> LayerState:
    result = {}
    scales: list[Tensor | float] = [1.0] * len(layers)
    top = None
    if "max" in layers[0]:
        top = torch.stack([layer["max"] for layer in layers]).amax(0)
        scales = [(layer["max"] - top).exp() for layer in layers]
    for name, example in layers[0].items():
        values = [layer[name] for layer in layers]
        if name == "max" and top is not None:
            result[name] = top
        elif not example.is_floating_point():
            result[name] = _same(name, values)
        else:
            own = scales if name in ("num", "den") else [1.0] * len(values)
            terms = [wide(value) * scale * weight for value, scale, weight in zip(values, own, weights, strict=True)]
            result[name] = torch.stack(terms).sum(0).to(example.dtype)
    return result


def _same(name: str, values: Sequence[Tensor]) -> Tensor:
    if not all(torch.equal(value, values[0]) for value in values):
        raise WkvError(f"{name} cannot be mixed: it differs between the states and is no floating-point number")
    return values[0].clone()
