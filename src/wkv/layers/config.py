"""Sizes and options of models: dataclasses that check themselves."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from wkv.errors import WkvError

Check = Callable[[Any], str | None]  # None, or what was expected


@dataclasses.dataclass(kw_only=True)
class LanguageModelConfig:
    """Sizes every model has. A size of None takes the official rule and is filled in at construction.

    Args:
        vocab_size: V, rows of the embedding and of the head.
        hidden_size: C, width of the residual stream (`n_embd`).
        num_layers: L.
        attention_size: A, width of the time mix (`dim_att`); C by default.
        ffn_size: F, inner width of the channel mix (`dim_ffn`).
        norm_eps: eps of the layer norms.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    attention_size: int | None = None
    ffn_size: int | None = None
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_field(field, getattr(self, field.name))
        if self.attention_size is None:
            self.attention_size = self.hidden_size

    def to_dict(self) -> dict[str, Any]:
        """All fields, sizes filled in."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(kw_only=True)
class MultiHeadConfig(LanguageModelConfig):
    """Sizes of models with matrix-valued states.

    Args:
        head_size: N; A must be a multiple of it.
        head_norm_eps: eps of the group norm over heads.
    """

    head_size: int = 64
    head_norm_eps: float = 64e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.attention_size is not None
        if self.attention_size % self.head_size:
            found = f"attention_size {self.attention_size} is not a multiple of head_size {self.head_size}"
            raise WkvError(f"{found}; choose a head_size that divides it")

    @property
    def num_heads(self) -> int:
        """H = A / N."""
        assert self.attention_size is not None
        return self.attention_size // self.head_size


def check_field(field: dataclasses.Field[Any], value: object) -> None:
    """Raise `WkvError` unless the value is allowed.

    A field made by `option` has its own check. Of the others, names that end in `_eps` are positive numbers and all
    the rest positive integers; None is allowed where it is the default.
    """
    if value is None and field.default is None:
        return
    check = field.metadata.get("check") or (positive if field.name.endswith("_eps") else at_least(1))
    expected = check(value)
    if expected is not None:
        raise WkvError(f"{field.name} must be {expected}, found {value!r}")


def option(default: Any, check: Check) -> Any:
    """A field that is no positive integer. The default None means that the class fills it in; lists are copied.

    Args:
        default: the value where none is given.
        check: one of the functions below, or any that returns None or what was expected.
    """
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"check": check})
    return dataclasses.field(default=default, metadata={"check": check})


def positive(value: object) -> str | None:
    """Any number above 0."""
    return None if _is_number(value) and value > 0 else "a positive number"  # type: ignore[operator]


def between(low: float, high: float, *, open_low: bool = False) -> Check:
    """Any number in [low, high], or (low, high]."""

    def check(value: Any) -> str | None:
        fits = _is_number(value) and (low < value if open_low else low <= value) and value <= high
        return None if fits else f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"

    return check


def at_least(low: int) -> Check:
    """An integer that is not below `low`."""

    def check(value: Any) -> str | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
        return None if fits else ("a positive integer" if low == 1 else f"an integer of at least {low}")

    return check


def one_of(*choices: str) -> Check:
    """One of some words."""
    return lambda value: None if value in choices else f"one of {', '.join(map(repr, choices))}"


def flag(value: object) -> str | None:
    """True or False."""
    return None if isinstance(value, bool) else "true or false"


def indices(value: Any) -> str | None:
    """A list of different integers from 0 on, in rising order (a tuple would come back from a file as a list)."""
    fits = isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value)
    rises = fits and all(a < b for a, b in itertools.pairwise(value))
    return None if rises else "a list of different indices in rising order"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
