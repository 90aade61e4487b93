"""The errors `wkv` raises on bad input.

All are `ValueError`s that say what was found, what was expected and what to do.
"""

from __future__ import annotations


class WkvError(ValueError):
    """Base class: bad arguments, shapes, states or options."""


class CheckpointError(WkvError):
    """A file is truncated, foreign, inconsistent, or not what it was said to be."""


class TokenizerError(WkvError):
    """Text or token ids that a tokenizer cannot handle, or a tokenizer file that cannot be read."""


class RecipeError(WkvError):
    """A training recipe with an unknown key, a wrong type or an impossible value."""


class DataError(WkvError):
    """Training text that is missing, empty or unreadable."""
