"""Random arguments of wkv5 and wkv6, and one way to run an operator with all its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.ops.helpers import max_error
from wkv import ops

OPERATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"wkv5": ops.wkv5, "wkv6": ops.wkv6}
INPUTS = ("r", "log_w", "k", "v", "u", "state")


@dataclass(frozen=True)
class Case:
    """Arguments of one call and the gradients that flow into its results."""

    operator: str
    r: Tensor
    log_w: Tensor
    k: Tensor
    v: Tensor
    u: Tensor
    state: Tensor | None
    mask: Tensor | None
    reset: Tensor | None
    dy: Tensor
    d_state: Tensor

    def tokens(self, start: int, stop: int) -> Case:
        """The same call over tokens start .. stop only."""
        names = ("r", "k", "v", "dy", "mask", "reset") + (("log_w",) if self.log_w.ndim == 4 else ())
        cut = {name: getattr(self, name) for name in names}
        return replace(self, **{name: None if x is None else x[:, start:stop] for name, x in cut.items()})

    def to(self, dtype: torch.dtype) -> Case:
        changes = {name: getattr(self, name) for name in (*INPUTS, "dy", "d_state")}
        return replace(self, **{name: None if x is None else x.to(dtype) for name, x in changes.items()})


def random_case(
    operator: str,
    length: int,
    *,
    batch: int = 2,
    heads: int = 2,
    size: int = 8,
    state: bool = True,
    mask: bool = False,
    reset: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """Normal inputs and log-decays from -1e-3 to -50; about a third of the tokens masked, a tenth reset."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads, size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    log_w = -torch.exp(2 * normal(*(shape if operator == "wkv6" else shape[2:])) - 1)
    case = Case(
        operator,
        r=normal(*shape),
        log_w=log_w,
        k=normal(*shape),
        v=normal(*shape),
        u=normal(heads, size),
        state=normal(batch, heads, size, size) if state else None,
        mask=torch.rand(batch, length, generator=g) < 0.7 if mask else None,
        reset=torch.rand(batch, length, generator=g) < 0.1 if reset else None,
        dy=normal(*shape),
        d_state=normal(batch, heads, size, size),
    )
    return case.to(dtype)


def run(case: Case, backend: str, autocast: bool = False) -> dict[str, Tensor]:
    """y (0 where masked), the final state, and the gradient of every input as "d" + name."""
    leaves = {
        name: getattr(case, name).detach().clone().requires_grad_()
        for name in INPUTS
        if getattr(case, name) is not None
    }
    with ops.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, final = OPERATORS[case.operator](**leaves, mask=case.mask, reset=case.reset)
    grads = torch.autograd.grad([y, final], list(leaves.values()), [case.dy.to(y.dtype), case.d_state.to(final.dtype)])
    if case.mask is not None:
        y = y.masked_fill(~case.mask[:, :, None, None], 0)
    return {"y": y, "final": final, **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bar: float) -> None:
    """Every tensor within `bar` of its counterpart, relative to the counterpart's largest entry."""
    assert actual.keys() == expected.keys()
    errors = {name: max_error(actual[name], expected[name]) for name in expected}
    assert all(error <= bar for error in errors.values()), errors


def run_golden(operator: str, inputs: dict[str, Tensor], dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Results under the names of the golden files, where states are [B, H, N_key, N_value] and w = log(-log_w)."""
    x = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    state = x["s0"] if "s0" in x else torch.zeros_like(x["dsT"])
    tokens = {name: x[name] for name in ("r", "k", "v", "u", "dy")}
    log_w = -x["w"].exp()
    case = Case(operator, **tokens, log_w=log_w, state=state.mT, mask=None, reset=None, d_state=x["dsT"].mT)
    found = run(case, backend)
    renamed = {"sT": found.pop("final").mT, "ds0": found.pop("dstate").mT, "dw": found.pop("dlog_w") * log_w}
    return found | renamed
