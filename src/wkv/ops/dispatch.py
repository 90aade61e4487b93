"""One small dispatcher: which backend runs an operator, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wkv.errors import WkvError

# Fastest first. A backend that cannot run on the tensors at hand is passed over.
PRIORITY = ("triton", "native", "chunked", "reference")
# One token is one step of the recurrence: the equation itself is the fastest torch form.
SINGLE = ("native", "triton", "reference")

_forced: list[str] = []


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    `unusable(device)` returns None where the backend can run, else the reason in words; so does `unfit(arguments)` for
    the tensors of one call, the token tensor [B, T, ...] first.
    """

    name: str
    function: Callable[..., Any]
    unusable: Callable[[torch.device], str | None] = lambda device: None
    unfit: Callable[[Sequence[Tensor | None]], str | None] = lambda arguments: None

    def refuses(self, arguments: Sequence[Tensor | None]) -> str | None:
        """Why it cannot run on these arguments; None where it can."""
        assert arguments[0] is not None
        return self.unusable(arguments[0].device) or self.unfit(arguments)


@dataclass(frozen=True)
class BackendStatus:
    """What `backends()` reports: `reason` says why a backend is not usable (empty if it is)."""

    name: str
    usable: bool
    reason: str = ""


_operators: dict[str, dict[str, Backend]] = {}


def register(operator: str, backend: Backend) -> None:
    """Add `backend` to `operator`; a later registration under the same name replaces the earlier one."""
    if backend.name not in PRIORITY:
        raise WkvError(f"backend {backend.name!r} is unknown; one of {', '.join(PRIORITY)}")
    _operators.setdefault(operator, {})[backend.name] = backend


def backends(operator: str, device: str | torch.device = "cpu") -> list[BackendStatus]:
    """The backends of `operator` ("wkv7", ...) on `device`, fastest first, usable or not and why."""
    table = _table(operator)
    statuses = []
    for name in PRIORITY:
        reason = table[name].unusable(torch.device(device)) if name in table else "not part of this installation"
        statuses.append(BackendStatus(name, reason is None, reason or ""))
    return statuses


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every operator called inside the `with` block.

    Raises:
        WkvError: if `name` is no backend; a backend that cannot run raises when an operator is called.
    """
    if name not in PRIORITY:
        raise WkvError(f"backend {name!r} is unknown; one of {', '.join(PRIORITY)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def forced_backend() -> str | None:
    """The name given to the innermost `use_backend`, or None."""
    return _forced[-1] if _forced else None


def select(operator: str, *arguments: Tensor | None) -> Callable[..., Any]:
    """The function that runs `operator` on these tensors, of which the first is [B, T, ...].

    Raises:
        WkvError: if the forced backend cannot.
    """
    table, first = _table(operator), arguments[0]
    assert first is not None
    if _forced:
        return _forced_backend(operator, table, arguments).function
    for name in _order(first.device, first.shape[1]):
        if name in table and table[name].refuses(arguments) is None:
            return table[name].function
    raise WkvError(f"no backend of {operator} runs on {first.device}")


def would_run(operator: str, device: str | torch.device = "cpu", length: int = 2) -> str:
    """The backend that `select` takes on `device` for tensors of `length` tokens that every backend can take.

    Raises:
        WkvError: if there is none, or the forced one cannot run there.
    """
    table, device = _table(operator), torch.device(device)
    for name in _forced[-1:] or _order(device, length):
        if name in table and table[name].unusable(device) is None:
            return name
    raise WkvError(f"no backend of {operator} runs on {device}")


def _order(device: torch.device, length: int) -> list[str]:
    """The names to try. On a CPU Triton has an interpreter for tests, which must be asked for."""
    names = SINGLE if length == 1 else PRIORITY
    return [name for name in names if name != "triton" or device.type != "cpu"]


def _forced_backend(operator: str, table: dict[str, Backend], arguments: Sequence[Tensor | None]) -> Backend:
    name, first = _forced[-1], arguments[0]
    assert first is not None
    reason = table[name].refuses(arguments) if name in table else "not part of this installation"
    if reason is not None:
        raise WkvError(f"backend {name!r} of {operator} cannot run on {first.device}: {reason}")
    return table[name]


def _table(operator: str) -> dict[str, Backend]:
    if operator not in _operators:
        raise WkvError(f"operator {operator!r} is unknown; one of {', '.join(sorted(_operators))}")
    return _operators[operator]
