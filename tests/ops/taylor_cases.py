"""Random arguments of linear_attention and taylor_attention, and one way to run them with all their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from wkv import ops
from wkv.ops.taylor import feature_count

OPERATORS: dict[str, Callable[..., Any]] = {
    "linear_attention": ops.linear_attention,
    "taylor_attention": ops.taylor_attention,
}
both_operators = pytest.mark.parametrize("operator", list(OPERATORS))
TOKENS = ("q", "k", "v")
STATE = ("kv", "z")


@dataclass(frozen=True)
class Case:
    """Arguments of one call and the gradients that flow into its results."""

    operator: str
    q: Tensor
    k: Tensor
    v: Tensor
    kv: Tensor | None
    z: Tensor | None
    mask: Tensor | None
    reset: Tensor | None
    dy: Tensor
    d_kv: Tensor
    d_z: Tensor

    def tokens(self, start: int, stop: int) -> Case:
        """The same call over tokens start .. stop only."""
        names = (*TOKENS, "dy", "mask", "reset")
        cut = {name: getattr(self, name) for name in names}
        return replace(self, **{name: None if x is None else x[:, start:stop] for name, x in cut.items()})

    def to(self, dtype: torch.dtype) -> Case:
        names = (*TOKENS, *STATE, "dy", "d_kv", "d_z")
        changes = {name: getattr(self, name) for name in names}
        return replace(self, **{name: None if x is None else x.to(dtype) for name, x in changes.items()})

    def leaves(self) -> dict[str, Tensor]:
        """Copies of the arguments that get gradients, by name."""
        given = {name: getattr(self, name) for name in (*TOKENS, *STATE)}
        return {name: x.detach().clone().requires_grad_() for name, x in given.items() if x is not None}

    def call(self, leaves: dict[str, Tensor], **options: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The operator, of `leaves` in place of the case's own tensors."""
        state = (leaves["kv"], leaves["z"]) if "kv" in leaves else None
        tokens = [leaves[name] for name in TOKENS]
        found: tuple[Tensor, tuple[Tensor, Tensor]] = OPERATORS[self.operator](
            *tokens, state, mask=self.mask, reset=self.reset, **options
        )
        return found


def random_case(
    operator: str,
    length: int,
    *,
    batch: int = 2,
    heads: int = 2,
    size: int = 4,
    values: int = 5,
    state: bool = True,
    mask: bool = False,
    reset: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Normal inputs (features positive), a state that three tokens have left; a third masked, a tenth reset."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    linear = operator == "linear_attention"
    q, k = (x.abs() + 0.1 if linear else x for x in normal(2, batch, length, heads, size).unbind())
    past = normal(batch, 3, heads, size)
    phi = past.abs() if linear else ops.taylor_features(past)
    kv, z = torch.einsum("bthn,bthe->bhne", normal(batch, 3, heads, values), phi), phi.sum(1)
    features = size if linear else feature_count(size)
    case = Case(
        operator,
        q=q,
        k=k,
        v=normal(batch, length, heads, values),
        kv=kv if state else None,
        z=z if state else None,
        mask=torch.rand(batch, length, generator=g) < 0.7 if mask else None,
        reset=torch.rand(batch, length, generator=g) < 0.1 if reset else None,
        dy=normal(batch, length, heads, values),
        d_kv=normal(batch, heads, values, features),
        d_z=normal(batch, heads, features),
    )
    return case.to(dtype)


def run(case: Case, backend: str, autocast: bool = False, **options: Any) -> dict[str, Tensor]:
    """y (0 where masked), the final kv and z, and the gradient of every input as "d" + name."""
    leaves = case.leaves()
    with ops.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, (kv, z) = case.call(leaves, **options)
    into = [case.dy.to(y.dtype), case.d_kv.to(kv.dtype), case.d_z.to(z.dtype)]
    grads = torch.autograd.grad([y, kv, z], list(leaves.values()), into)
    if case.mask is not None:
        y = y.masked_fill(~case.mask[:, :, None, None], 0)
    return {"y": y, "kv": kv, "z": z, **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}
