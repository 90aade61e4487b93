"""What training does with the tensors of a state, whatever model it belongs to."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from wkv.state import State


def free(state: State) -> State:
    """The same values, apart from the graph and from the activations whose last ones token-shift states are."""
    return state.detach().clone()


def leaf_state(state: State) -> State:
    """The same values as leaves that collect gradients."""
    return with_tensors(state, [x.detach().requires_grad_(x.is_floating_point()) for x in state_tensors(state)])


def state_tensors(state: State) -> list[Tensor]:
    """All tensors, layer by layer, by name: an empty state need not have the order of one that a model returns."""
    return [layer[name] for layer in state.layers for name in sorted(layer)]


def with_tensors(state: State, tensors: Iterable[Tensor]) -> State:
    """A state of the same kind, made of others in the order of `state_tensors`."""
    rest = iter(tensors)
    return State(state.model, [{name: next(rest) for name in sorted(layer)} for layer in state.layers])


def put(shelf: Tensor, x: Tensor, place: int) -> Tensor:
    """A copy of `x`, on the shelf if it is as large as the first one there was (caches of attention grow)."""
    if x.shape != shelf.shape[1:]:
        return x.clone()
    shelf[place] = x
    return shelf[place]
