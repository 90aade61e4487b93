"""Checks of the options of methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from wkv.errors import WkvError


def check_options(method: str, options: dict[str, Any], function: Callable[..., Any], skip: int) -> dict[str, Any]:
    """The options, if `function` takes them; its first `skip` parameters are not options.

    Raises:
        WkvError: for one it does not take, with those it takes.
    """
    known = list(inspect.signature(function).parameters)[skip:]
    unknown = next((key for key in options if key not in known), None)
    if unknown is not None:
        raise WkvError(f"{method} has no option {unknown!r}; it has {', '.join(known)}")
    return options


def check_rank(rank: Any, name: str = "rank") -> int:
    """A positive integer.

    Raises:
        WkvError: for anything else.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise WkvError(f"{name} must be a positive integer, found {rank!r}")
    return rank
